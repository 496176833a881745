"""Runs stock and patched in two processes that take turns, and writes what came out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console

from fasttune.demo import model as models
from fasttune.demo import packaged, report
from fasttune.demo.data import Sample
from fasttune.demo.display import Display
from fasttune.demo.encode import Split, split_samples, training_order
from fasttune.demo.handle import WorkerHandle, worker_environment
from fasttune.demo.interrupt import Interrupted, InterruptFlag, ctrl_c_ignored, sigterm_as_ctrl_c
from fasttune.demo.options import DEFAULT_STEPS, DemoError, DemoOptions
from fasttune.demo.output import ADAPTER, PLOT, RESULT, OutputFolder
from fasttune.demo.protocol import (
    BlockDone,
    Calibrate,
    Calibrated,
    Describe,
    Described,
    Evaluate,
    Evaluated,
    Generate,
    Generated,
    Go,
    Halt,
    Ready,
    Save,
    Saved,
    StepDone,
    Train,
    Trained,
    WorkerSpec,
)
from fasttune.demo.record import WORKERS, RunRecord
from fasttune.demo.turns import affordable_steps, block_steps, grouped, turns, warmup_steps

CALIBRATION_BATCHES = 3  # the first warms up and is not counted
MAX_NEW_TOKENS = 64
REPORT_RESERVE_S = 10.0  # for the Trainer's start, saving and plotting


@dataclass(frozen=True)
class Task:
    """What both workers do, decided before they are ready."""

    tokenizer: Any
    split: Split
    device: str
    dtype: str


class DemoRun:
    """The phases of one run. The caller closes the workers."""

    def __init__(
        self, options: DemoOptions, folder: OutputFolder, display: Display, task: Task, model: str
    ) -> None:
        self._options = options
        self._folder = folder
        self._display = display
        self._task = task
        self._held_out = grouped(
            sorted(task.split.held_out, key=lambda example: example.n_tokens), options.batch_size
        )
        self.workers: dict[str, WorkerHandle] = {}
        self.flag = InterruptFlag()
        self.record = RunRecord(
            model=model,
            device=task.device,
            hardware=report.hardware_name(task.device),
            dtype=task.dtype,
            n_train=task.split.n_train_samples,
            n_held_out=len(task.split.held_out),
            n_truncated=task.split.n_truncated,
            n_dropped=task.split.n_dropped,
            steps_requested=options.steps or DEFAULT_STEPS,
            question=_question(task.split.shown, task),
            reference=task.split.reference,
        )

    def _notice(self, name: str, text: str) -> None:
        self.record.notices.append(f"{name}: {text}")
        self._display.line(f"{name}: {text}")

    def start(self, source: models.ModelSource) -> None:
        """Starts both workers, which load their models at the same time."""
        for name in WORKERS:
            spec = WorkerSpec(
                name=name,
                patched=name == "patched",
                source=source,
                dtype=self._task.dtype,
                device="cuda" if self._task.device.startswith("cuda") else self._task.device,
                seed=self._options.seed,
                pad_id=pad_id(self._task.tokenizer),
                scratch=str(self._folder.scratch / name),
                log=str(self._folder.scratch / f"{name}.log"),
            )
            with worker_environment(self._task.device):
                self.workers[name] = WorkerHandle(spec, partial(self._notice, name))
        for name in WORKERS:
            ready = self.workers[name].expect(Ready)
            self.record.parameters, self.record.trainable = ready.parameters, ready.trainable
            self.record.threads = ready.threads
            self.record.workers[name].memory_method = ready.memory_method

    def calibrate(self) -> float:
        """Times a few batches without learning; returns seconds for one step of both workers."""
        options, pair_s = self._options, 0.0
        count = CALIBRATION_BATCHES * options.batch_size
        examples = training_order(self._task.split.train, count, options.seed)
        batches = grouped(examples, options.batch_size)
        for name in WORKERS:
            seconds = self.workers[name].request(Calibrate(batches), Calibrated).seconds
            self.record.workers[name].calibration_s = seconds
            pair_s += sum(seconds[1:]) / len(seconds[1:]) * options.grad_accum
        return pair_s

    def evaluate_before(self) -> None:
        """Held-out loss of both and an answer, untrained."""
        for name in WORKERS:
            evaluated = self.workers[name].request(Evaluate(self._held_out), Evaluated)
            self.record.workers[name].held_out_before = evaluated.loss
        self.record.answer_before = self._answer()

    def evaluate_after(self) -> None:
        """The same after training."""
        for name in WORKERS:
            evaluated = self.workers[name].request(
                Evaluate(self._held_out), Evaluated, self.flag.check
            )
            self.record.workers[name].held_out_after = evaluated.loss
        self.record.answer_after = self._answer(self.flag.check)

    def _answer(self, check: Callable[[], None] = lambda: None) -> str:
        command = Generate(self._task.split.prompt_ids, MAX_NEW_TOKENS)
        ids = self.workers["patched"].request(command, Generated, check).ids
        return str(self._task.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def plan(self, pair_s: float, spent_s: float, evaluation_s: float) -> int:
        """The number of steps, with a message if it is reduced."""
        left_s = self._options.budget_s - spent_s - evaluation_s - REPORT_RESERVE_S
        steps = affordable_steps(self._options, pair_s, left_s)
        self.record.steps_planned = steps
        self.record.block_steps = block_steps(steps)
        if steps < self.record.steps_requested:
            self._display.line(
                f"One step of both takes about {pair_s:.1f} s here: {steps} steps instead of "
                f"{self.record.steps_requested}, to stay within {self._options.budget_s / 60:g} "
                "minutes. --steps N overrides this."
            )
        return steps

    def train(self, steps: int) -> None:
        """Both workers take turns until each has done ``steps`` steps.

        Raises:
            Interrupted: after Ctrl-C; a worker may still be in its step.
        """
        options = self._options
        per_step = options.batch_size * options.grad_accum
        examples = training_order(self._task.split.train, steps * per_step, options.seed)
        self.record.step_tokens = [
            sum(example.n_tokens for example in step) for step in grouped(examples, per_step)
        ]
        command = Train(
            examples=examples,
            steps=steps,
            warmup_steps=warmup_steps(steps),
            batch_size=options.batch_size,
            grad_accum=options.grad_accum,
            lr=options.lr,
        )
        for worker in self.workers.values():
            worker.send(command)
        with self._display.training(steps):
            for name, count in turns(steps):
                self.flag.check()
                self.workers[name].send(Go(count))
                while not self._block_is_done(name):
                    pass
                done = self.record.workers[name].steps
                self._display.block(name, done[-1] if done else None, steps)
        for worker in self.workers.values():
            worker.expect(Trained, self.flag.check)

    def _block_is_done(self, name: str) -> bool:
        event = self.workers[name].receive(self.flag.check)
        record = self.record.workers[name]
        if isinstance(event, StepDone):
            record.steps.append(event)
            self._display.step(name, event)
            return False
        if isinstance(event, BlockDone):
            record.block_peaks_bytes.append(event.peak_bytes)
            return True
        raise RuntimeError(f"unexpected {event}")

    def describe(self) -> None:
        """Asks what was patched, once the first forward has decided it."""
        self.record.patch_report = self.workers["patched"].request(Describe(), Described).text

    def save_adapter(self) -> None:
        """The patched worker writes its adapter."""
        self.workers["patched"].request(Save(str(self._folder.files / ADAPTER)), Saved)

    def halt_and_save(self) -> int:
        """After Ctrl-C: ends the patched worker's current step and saves; returns its steps."""
        self.record.interrupted = True
        worker, record = self.workers["patched"], self.record.workers["patched"]
        for halted in (worker, self.workers["stock"]):
            halted.send(Halt())
        worker.send(Save(str(self._folder.files / ADAPTER)))
        while not isinstance(event := worker.receive(), Saved):
            if isinstance(event, StepDone):
                record.steps.append(event)
        return len(record.steps)


def pad_id(tokenizer: Any) -> int:
    """Any token does, since padding is masked."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in ids if token is not None)


def _question(sample: Sample, task: Task) -> str:
    users = [message.content for message in sample.messages if message.role == "user"]
    if users:
        return users[0]
    return str(task.tokenizer.decode(task.split.prompt_ids, skip_special_tokens=True))


def _prepare(options: DemoOptions, samples: list[Sample], source: models.ModelSource) -> Task:
    models.quiet_transformers()
    device = models.resolve_device(options.device)
    tokenizer = models.load_tokenizer(source)
    split = split_samples(
        tokenizer, samples, seq_len=options.seq_len, packing=options.packing, seed=options.seed
    )
    return Task(tokenizer, split, device, models.resolve_dtype(options.dtype, device))


@contextlib.contextmanager
def _closing(run: DemoRun) -> Iterator[None]:
    try:
        yield
    finally:
        with ctrl_c_ignored():
            for worker in run.workers.values():
                worker.close()


def run_demo(options: DemoOptions, samples: list[Sample], console: Console) -> int:
    """Runs the demo and returns the exit status: 0, or 130 after Ctrl-C.

    Raises:
        DemoError: a problem with the user's input; nothing is left behind.
        WorkerDied: a worker failed; nothing is left behind.
        KeyboardInterrupt: Ctrl-C before there was anything to save; nothing is left behind.
    """
    sigterm_as_ctrl_c()
    display = Display(console)
    source = models.find_model(options.model)
    with OutputFolder(options.out) as folder:
        started = time.perf_counter()
        with display.phase(f"Reading the data with the tokenizer of {source.name}"):
            task = _prepare(options, samples, source)
        run = DemoRun(options, folder, display, task, source.name)
        run.record.data = packaged.DATA_CREDIT if options.data is None else options.data.name
        run.record.data_license = packaged.DATA_LICENSE if options.data is None else None
        _introduce(run.record, display)
        with _closing(run):
            with display.phase("Loading the model into two processes, stock and patched"):
                run.start(source)
            run.record.setup_s = time.perf_counter() - started
            return _measure(run, folder, display, options, console)


def _introduce(record: RunRecord, display: Display) -> None:
    display.line(f"Data: {record.data}")
    extra = f", {record.n_truncated} cut to --seq-len" if record.n_truncated else ""
    extra += (
        f", {record.n_dropped} left out (no answer within --seq-len)" if record.n_dropped else ""
    )
    display.line(f"      {record.n_train} samples to train on, {record.n_held_out} held out{extra}")
    display.line(f"Model: {record.model}, {record.dtype}, on {record.hardware} ({record.device})")


def _measure(
    run: DemoRun, folder: OutputFolder, display: Display, options: DemoOptions, console: Console
) -> int:
    started = time.perf_counter()
    with display.phase("Timing a few steps"):
        pair_s = run.calibrate()
    before = time.perf_counter()
    with display.phase("Held-out loss and an answer before training"):
        run.evaluate_before()
    now = time.perf_counter()
    steps = run.plan(pair_s, now - started, now - before)
    done = steps
    with run.flag:
        try:
            run.train(steps)
            with display.phase("Held-out loss and an answer after training"):
                run.evaluate_after()
            run.describe()
            run.save_adapter()
        except Interrupted:
            display.line("Interrupted: finishing the current step ...")
            done = run.halt_and_save()
            if not done:
                raise KeyboardInterrupt from None
        run.record.run_s = time.perf_counter() - started
        _write(run.record, options, folder)
    if run.record.interrupted:
        display.line(
            f"Saved the adapter as it is after {done} of {steps} steps: {options.out / ADAPTER}"
        )
        return 130
    _present(run.record, options, console)
    return 0


def _write(record: RunRecord, options: DemoOptions, folder: OutputFolder) -> None:
    try:
        report.write_result(record, options, folder.files / RESULT)
        if not record.interrupted:
            report.write_plot(record, folder.files / PLOT)
    except OSError as error:  # a full disk, say
        raise DemoError(f"cannot write --out {options.out}: {error.strerror}") from None
    folder.commit()


def _present(record: RunRecord, options: DemoOptions, console: Console) -> None:
    if record.patch_report:
        console.print(record.patch_report, markup=False, highlight=False)
    report.print_table(record, console)
    report.print_answers(record, console)
    console.print(
        f"\nWrote {options.out / ADAPTER} (PEFT), {options.out / RESULT} and {options.out / PLOT} "
        f"after {record.run_s:.0f} s (and {record.setup_s:.0f} s of loading).",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )

"""One worker process: loads its own model, runs its own Trainer, answers the parent's commands."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import connection, parent_process
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from fasttune.demo.encode import IGNORE, Example, collate
from fasttune.demo.model import add_lora, load_model, quiet_transformers, save_adapter
from fasttune.demo.protocol import (
    Calibrate,
    Calibrated,
    Command,
    Describe,
    Described,
    Evaluate,
    Evaluated,
    Event,
    Failed,
    Generate,
    Generated,
    Halt,
    Notice,
    Quit,
    Ready,
    Save,
    Saved,
    Train,
    Trained,
    WorkerSpec,
)
from fasttune.memory import memory_meter

Pipe = connection.Connection  # of commands in, events out


def _end_with_the_parent() -> None:
    """Ends this process as soon as the parent is gone, whatever it is doing."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Notices(logging.Handler):
    """Passes warnings of the ``fasttune`` logger on to the user."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(logging.WARNING)
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        self._worker.send(Notice(record.getMessage()))


def next_token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Sum of the fp32 cross-entropy over trained tokens, and how many there are.

    logits [batch, length, vocabulary], labels [batch, length] with IGNORE; shifted here.
    """
    targets = labels[:, 1:]
    trained = targets != IGNORE
    picked = logits[:, :-1][trained].float()
    return functional.cross_entropy(picked, targets[trained], reduction="sum"), int(trained.sum())


class Worker:
    """The model of one process and the commands on it."""

    def __init__(self, spec: WorkerSpec, pipe: Any) -> None:
        self._spec = spec
        self._pipe = pipe
        self._send_lock = threading.Lock()  # backward threads may log a notice
        self._meter = memory_meter(spec.device)
        base = load_model(spec.source, dtype=spec.dtype, device=spec.device)
        self._model: Any = add_lora(base, spec.seed)
        if spec.patched:
            import fasttune

            logging.getLogger("fasttune").addHandler(_Notices(self))
            fasttune.patch(self._model)

    def send(self, event: Event) -> None:
        """Sends one event to the parent."""
        with self._send_lock:
            self._pipe.send(event)

    def ready(self) -> Ready:
        """The event that says that commands may come."""
        sizes = [(p.numel(), p.requires_grad) for p in self._model.parameters()]
        return Ready(
            parameters=sum(n for n, _ in sizes),
            trainable=sum(n for n, trained in sizes if trained),
            threads=torch.get_num_threads(),
            memory_method=self._meter.method,
        )

    def serve(self) -> None:
        """Answers commands until ``Quit``."""
        while True:
            command: Command = self._pipe.recv()
            match command:
                case Quit():
                    return
                case Halt():
                    pass
                case Calibrate(batches):
                    self.send(Calibrated(self._calibrate(batches)))
                case Evaluate(batches):
                    self.send(self._evaluate(batches))
                case Generate(prompt_ids, max_new_tokens):
                    self.send(Generated(self._generate(prompt_ids, max_new_tokens)))
                case Train():
                    self.send(Trained(self._train(command)))
                case Describe():
                    self.send(Described(self._describe()))
                case Save(folder):
                    save_adapter(self._model, folder)
                    self.send(Saved())
                case _:
                    raise RuntimeError(f"unexpected command {command}")

    def _batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = collate(examples, self._spec.pad_id)
        return {name: tensor.to(self._spec.device) for name, tensor in batch.items()}

    def _synchronize(self) -> None:
        if self._spec.device.startswith("cuda"):
            torch.cuda.synchronize()

    def _calibrate(self, batches: Sequence[Sequence[Example]]) -> list[float]:
        self._model.train()
        seconds = []
        for examples in batches:
            batch = self._batch(examples)
            self._synchronize()
            start = time.perf_counter()
            self._model(**batch).loss.backward()
            self._model.zero_grad()
            self._synchronize()
            seconds.append(time.perf_counter() - start)
        return seconds

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        self._model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._model.train()

    def _evaluate(self, batches: Sequence[Sequence[Example]]) -> Evaluated:
        start = time.perf_counter()
        total, count = 0.0, 0
        with self._inference():
            for examples in batches:
                if self._pipe.poll():  # only Halt can come now, and nobody waits for the result
                    break
                batch = self._batch(examples)
                labels = batch.pop("labels")
                loss, tokens = next_token_loss(self._model(**batch).logits, labels)
                total, count = total + loss.item(), count + tokens
        return Evaluated(total / count if count else math.nan, time.perf_counter() - start)

    def _generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        def halted(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((ids.shape[0],), self._pipe.poll(), device=ids.device)

        prompt = torch.tensor([list(prompt_ids)], device=self._spec.device)
        with self._inference():
            ids = self._model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=self._spec.pad_id,
                stopping_criteria=[halted],
            )
        new: list[int] = ids[0, prompt.shape[1] :].tolist()
        return new

    def _train(self, command: Train) -> int:
        from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

        from fasttune.demo.gate import GateCallback, Halted

        collator = partial(collate, pad_id=self._spec.pad_id)

        class OrderedTrainer(Trainer):  # type: ignore[misc]  # transformers has no types here
            """Takes the examples in the order in which the parent sent them."""

            def get_train_dataloader(self) -> DataLoader[Any]:
                return DataLoader(
                    command.examples,  # type: ignore[arg-type]  # a list is a map-style dataset
                    batch_size=command.batch_size,
                    shuffle=False,
                    collate_fn=collator,
                )

        arguments = TrainingArguments(
            output_dir=self._spec.scratch,
            max_steps=command.steps,
            per_device_train_batch_size=command.batch_size,
            gradient_accumulation_steps=command.grad_accum,
            learning_rate=command.lr,
            lr_scheduler_type="cosine",
            warmup_steps=command.warmup_steps,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=0,
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=self._spec.device == "cpu",
            seed=self._spec.seed,
        )
        gate = GateCallback(
            send=self.send,
            receive=self._pipe.recv,
            waiting=self._pipe.poll,
            meter=self._meter,
            device=self._spec.device,
        )
        trainer = OrderedTrainer(
            model=self._model,
            args=arguments,
            train_dataset=command.examples,
            callbacks=[gate],
        )
        trainer.remove_callback(PrinterCallback)
        set_seed(self._spec.seed)
        self._meter.set_baseline()
        with contextlib.suppress(Halted):
            trainer.train()
        return gate.steps_done

    def _describe(self) -> str:
        if not self._spec.patched:
            return ""
        import fasttune

        return str(fasttune.report(self._model))


def main(pipe: Any, spec: WorkerSpec) -> None:
    """Entry of the process. Whatever it prints goes to ``spec.log``."""
    _end_with_the_parent()
    log = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        quiet_transformers()
        worker = Worker(spec, pipe)
        worker.send(worker.ready())
        worker.serve()
    except (EOFError, BrokenPipeError):  # the parent is gone
        return
    except Exception as error:  # reported to the user by the parent
        last = traceback.format_exception_only(error)[-1].strip().splitlines()
        with contextlib.suppress(OSError):
            pipe.send(Failed(last[0] if last else repr(error), traceback.format_exc()))

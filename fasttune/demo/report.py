"""The table on the screen, ``result.json`` and the plot."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fasttune.demo.model import LORA_ALPHA, LORA_DROPOUT, LORA_RANK
from fasttune.demo.options import DemoOptions
from fasttune.demo.output import TOOL
from fasttune.demo.record import RunRecord, WorkerRecord, finite

SCHEMA_VERSION = 1
_VERSIONED = ("fasttune", "torch", "transformers", "peft")
_COLOURS = {"stock": "#777777", "patched": "#0b6fb8"}
_LINES = {"stock": "-", "patched": "--"}  # both stay visible where they agree


def hardware_name(device: str) -> str:
    """The GPU's name, or the CPU's."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(torch.device(device))
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _worker_json(worker: WorkerRecord, step_tokens: list[int]) -> dict[str, Any]:
    return {
        "step_time_s": worker.step_time_s(),
        "tokens_per_s": worker.tokens_per_s(step_tokens),
        "peak_memory_bytes": worker.peak_bytes(),
        "memory_method": worker.memory_method,
        "held_out_loss_before": finite(worker.held_out_before),
        "held_out_loss_after": finite(worker.held_out_after),
        "calibration_s": worker.calibration_s,
        "block_peaks_bytes": worker.block_peaks_bytes,
        "steps": [
            {key: finite(value) for key, value in asdict(step).items()} for step in worker.steps
        ],
    }


def result_json(record: RunRecord, options: DemoOptions) -> dict[str, Any]:
    """The content of ``result.json``: seconds, bytes, and None for what was not measured."""
    return {
        "tool": TOOL,
        "schema_version": SCHEMA_VERSION,
        "status": "interrupted" if record.interrupted else "completed",
        "versions": {name: _version(name) for name in _VERSIONED},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hardware": record.hardware,
        "device": record.device,
        "threads": record.threads,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(
                ("OMP_", "GOMP_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "ONEDNN_")
            )
        },
        "model": {
            "name": record.model,
            "dtype": record.dtype,
            "parameters": record.parameters,
            "trainable": record.trainable,
        },
        "lora": {
            "r": LORA_RANK,
            "alpha": LORA_ALPHA,
            "dropout": LORA_DROPOUT,
            "target_modules": "all-linear",
            "dtype": "float32",
        },
        "data": {
            "source": record.data,
            "license": record.data_license,
            "train_samples": record.n_train,
            "held_out_samples": record.n_held_out,
            "truncated_samples": record.n_truncated,
            "dropped_samples": record.n_dropped,
        },
        "training": {
            "steps_requested": record.steps_requested,
            "steps_planned": record.steps_planned,
            "steps_reduced": record.steps_planned < record.steps_requested,
            "block_steps": record.block_steps,
            "batch_size": options.batch_size,
            "grad_accum": options.grad_accum,
            "seq_len": options.seq_len,
            "packing": options.packing,
            "lr": options.lr,
            "schedule": "cosine with warm-up",
            "seed": options.seed,
            "step_tokens": record.step_tokens,
        },
        "stock": _worker_json(record.workers["stock"], record.step_tokens),
        "patched": _worker_json(record.workers["patched"], record.step_tokens),
        "speedup": record.speedup(),
        "memory_ratio": record.memory_ratio(),
        "generation": {
            "question": record.question,
            "reference": record.reference,
            "before": record.answer_before,
            "after": record.answer_after,
        },
        "patch_report": record.patch_report,
        "notices": record.notices,
        "setup_s": record.setup_s,
        "run_s": record.run_s,
    }


def write_result(record: RunRecord, options: DemoOptions, path: Path) -> None:
    """Writes ``result.json``."""
    text = json.dumps(result_json(record, options), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def print_table(record: RunRecord, console: Console) -> None:
    """Stock against patched."""
    stock, patched = record.workers["stock"], record.workers["patched"]
    rates = [worker.tokens_per_s(record.step_tokens) for worker in (stock, patched)]
    steps = [len(stock.steps), len(patched.steps)]
    table = Table(title=f"{record.model} on {record.hardware} ({record.dtype}), LoRA r {LORA_RANK}")
    for heading in ("", "stock", "patched", "patched : stock"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)

    def row(name: str, values: list[float | None], form: str, ratio: bool = True) -> None:
        before, after = values
        compared = after / before if ratio and before and after is not None else None
        table.add_row(name, *(_cell(value, form) for value in values), _ratio(compared))

    row("steps", list(steps), "d", ratio=False)
    times = [worker.step_time_s() for worker in (stock, patched)]
    row("step time, median (ms)", [None if t is None else t * 1e3 for t in times], ",.0f")
    row("non-padding tokens/s", rates, ",.1f")
    peaks = [worker.peak_bytes() for worker in (stock, patched)]
    row(
        "peak memory above the weights (MiB)",
        [None if p is None else p / 2**20 for p in peaks],
        ",.0f",
    )
    row(
        "held-out loss before", [stock.held_out_before, patched.held_out_before], ".4f", ratio=False
    )
    row("held-out loss after", [stock.held_out_after, patched.held_out_after], ".4f", ratio=False)
    console.print(table)
    if (speedup := record.speedup()) is not None:
        console.print(f"Speed-up over the same batches: {speedup:.2f}x", highlight=False)
    console.print(f"Memory: {stock.memory_method}.", highlight=False)
    console.print(
        "The two dropout masks come from different generators, so the losses agree statistically.",
        highlight=False,
    )


def print_answers(record: RunRecord, console: Console) -> None:
    """The held-out question and what the patched model says before and after."""
    for name, text in (
        ("Question (held out)", record.question),
        ("Answer before", record.answer_before),
        ("Answer after", record.answer_after),
        ("Reference", record.reference),
    ):
        console.print(f"\n[bold]{name}[/bold]")
        console.print("-" if text is None else text, markup=False, highlight=False)


def write_plot(record: RunRecord, path: Path) -> None:
    """Both loss curves and both step times as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, step_time = figure.subplots(1, 2)
    for name, worker in record.workers.items():
        numbers = [step.step for step in worker.steps]
        style = {"color": _COLOURS[name], "linestyle": _LINES[name], "label": name, "marker": "."}
        loss.plot(numbers, [step.loss for step in worker.steps], **style)
        step_time.plot(numbers, [step.seconds * 1e3 for step in worker.steps], **style)
    loss.set(title="training loss", xlabel="step", ylabel="loss per trained token")
    step_time.set(title="step time", xlabel="step", ylabel="ms")
    step_time.set_ylim(bottom=0)
    for axes in (loss, step_time):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{record.model}, {record.dtype}, {record.hardware}", fontsize=10)
    figure.savefig(path, dpi=120)

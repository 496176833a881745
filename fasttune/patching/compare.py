"""compare: time and memory of a training step, stock against patched, on the user's own device."""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from fasttune import _native
from fasttune.errors import PatchError
from fasttune.memory import MemoryMeter, memory_meter
from fasttune.patching import swap
from fasttune.patching.engine import is_patched
from fasttune.patching.report import render
from fasttune.patching.step import LossFn, preserved, run_loss


@dataclass(frozen=True)
class Comparison:
    """Medians over alternated steps (forward and backward, no optimizer); ``str()`` is a table.

    Attributes:
        stock_ms, fasttune_ms: time of a step in milliseconds.
        time_ratio: median of the paired ratios fasttune / stock; below 1, fasttune is faster.
        stock_bytes, fasttune_bytes: peak memory of a step above what was in use before it.
        method: how memory was measured.
        pairs: timed steps of each.
    """

    stock_ms: float
    fasttune_ms: float
    time_ratio: float
    stock_bytes: int
    fasttune_bytes: int
    method: str
    pairs: int

    def __str__(self) -> str:
        table = Table(
            "",
            "stock",
            "fasttune",
            "fasttune / stock",
            title=f"a training step, {self.pairs} pairs",
        )
        table.add_row(
            "time",
            f"{self.stock_ms:.1f} ms",
            f"{self.fasttune_ms:.1f} ms",
            f"{self.time_ratio:.2f}",
        )
        ratio = self.fasttune_bytes / max(self.stock_bytes, 1)
        stock, fused = (
            f"{size / 2**20:.0f} MiB" for size in (self.stock_bytes, self.fasttune_bytes)
        )
        table.add_row("peak memory", stock, fused, f"{ratio:.2f}")
        return render(table) + f"memory: {self.method}\n"


def compare(
    model: nn.Module, batch: Any, *, loss_fn: LossFn | None = None, pairs: int = 5
) -> Comparison:
    """Time and memory of forward and backward on ``batch``, stock and patched steps alternating.

    Random state, gradients, buffers and train / eval mode are as before afterwards; no parameter
    changes.

    Args:
        model: a patched model; the stock steps run its original forwards in place.
        batch: a mapping of the model's arguments with labels, or anything that ``loss_fn`` takes.
        loss_fn: ``loss_fn(model, batch)`` returns a 0-d loss; None takes ``model(**batch).loss``.
        pairs: measured steps of each kind, after one warm-up of each.

    Raises:
        PatchError: the model is not patched.
        ValueError: pairs is below 1, or the model returns no loss.
    """
    if not is_patched(model):
        raise PatchError("compare: the model is not patched; call fasttune.patch first")
    if pairs < 1:
        raise ValueError(f"pairs: expected at least 1, got {pairs}")
    device = next(model.parameters()).device
    meter = memory_meter(str(device))
    times: dict[bool, list[float]] = {True: [], False: []}
    with preserved(model):
        model.train()
        for measured in range(-1, pairs):
            order = (True, False) if measured % 2 else (False, True)  # neither always goes first
            for stock in order:
                elapsed_ms = _step_ms(model, batch, loss_fn, stock, device)
                if measured >= 0:
                    times[stock].append(elapsed_ms)
        # Apart from the timing: returning free memory to the system costs page faults afterwards.
        peaks = {stock: _step_peak(model, batch, loss_fn, stock, device, meter) for stock in times}
    ratios = [fused / stock for fused, stock in zip(times[False], times[True], strict=True)]
    return Comparison(
        statistics.median(times[True]),
        statistics.median(times[False]),
        statistics.median(ratios),
        peaks[True],
        peaks[False],
        meter.method,
        pairs,
    )


def _step_ms(
    model: nn.Module, batch: Any, loss_fn: LossFn | None, stock: bool, device: torch.device
) -> float:
    start = time.perf_counter()
    with swap.stock() if stock else contextlib.nullcontext():
        run_loss(model, batch, loss_fn).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed_ms = (time.perf_counter() - start) * 1e3
    model.zero_grad(set_to_none=True)
    return elapsed_ms


def _step_peak(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn | None,
    stock: bool,
    device: torch.device,
    meter: MemoryMeter,
) -> int:
    _native.free_scratch()
    meter.set_baseline()
    meter.start_block()
    _step_ms(model, batch, loss_fn, stock, device)
    return meter.end_block()

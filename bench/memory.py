"""Peak memory above the loaded weights, in a fresh process per measurement.

The baseline is taken when ``build`` has returned, that is with the weights loaded, so whatever a
variant keeps between steps counts against it. The high-water mark is reset after the warm-up step.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from fasttune.memory import memory_meter

WARMUP_STEPS = 2
STEPS = 2


@dataclass(frozen=True)
class MemoryPeaks:
    """Medians over fresh processes, bytes above the weights; ``ratio`` is stock over fasttune."""

    stock_bytes: int
    fasttune_bytes: int
    repeats: int
    method: str

    @property
    def ratio(self) -> float:
        """Above 1, fasttune needs less."""
        return self.stock_bytes / self.fasttune_bytes


def _peak(build: Callable[..., Callable[[], object]], arguments: tuple[Any, ...], device: str):
    step = build(*arguments)
    meter = memory_meter(device)
    meter.set_baseline()
    for _ in range(WARMUP_STEPS):
        step()
    meter.start_block()
    for _ in range(STEPS):
        step()
    return meter.end_block(), meter.method


def peak_above_weights(
    build: Callable[..., Callable[[], object]], *arguments: Any, device: str = "cpu"
) -> tuple[int, str]:
    """(bytes, method of measuring) of the step that ``build(*arguments)`` returns.

    ``build`` is a function of an importable module, and loads the weights. The process inherits the
    environment, and with it the allocator's settings, from this one. Raises what ``build`` or the
    step raises, and BrokenProcessPool if the process is killed, for instance for lack of memory.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(_peak, build, arguments, device).result()


def compare_peaks(
    build: Callable[..., Callable[[], object]], *arguments: Any, device: str, repeats: int
) -> MemoryPeaks:
    """``build(*arguments, patched)`` for stock (False) and fasttune (True), in turn."""
    peaks: dict[bool, list[int]] = {False: [], True: []}
    method = ""
    for _ in range(repeats):
        for patched, values in peaks.items():
            peak, method = peak_above_weights(build, *arguments, patched, device=device)
            values.append(peak)
    return MemoryPeaks(
        stock_bytes=int(statistics.median(peaks[False])),
        fasttune_bytes=int(statistics.median(peaks[True])),
        repeats=repeats,
        method=method,
    )

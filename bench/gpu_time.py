"""Times variants of the same work on a GPU: wall clock by events, and the work of the GPU alone.

Rounds alternate the variants. Two times are taken, because they answer different questions:

- ``ms``: between two CUDA events around a few steps, divided by them: what a user waits, with the
  gaps in which the GPU waits for Python.
- ``busy_ms``: the sum of the durations of the kernels, from torch's profiler, with their number:
  what the kernels themselves cost.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Step = Callable[[], object]
WARMUP_STEPS = 4
ROUNDS = 9
STEPS = 5  # of a round
BUSY_STEPS = 3


@dataclass(frozen=True)
class GpuTime:
    """Medians over the rounds, per step; ``spread`` is the largest round over the smallest."""

    ms: float
    spread: float
    busy_ms: float
    launches: float
    peak_bytes: int  # of allocated memory, above what was allocated before the step


def _round_ms(step: Step, steps: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(steps):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / steps


def _busy(step: Step) -> tuple[float, float]:
    """Milliseconds of kernels and copies, and their number, per step."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(BUSY_STEPS):
            step()
        torch.cuda.synchronize()
    events = [event for event in recorded.events() if event.device_type.name == "CUDA"]
    total_us = sum(event.device_time for event in events)
    return total_us / 1e3 / BUSY_STEPS, len(events) / BUSY_STEPS


def _peak(step: Step) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def time_variants(
    variants: Mapping[str, Step], rounds: int = ROUNDS, steps: int = STEPS
) -> dict[str, GpuTime]:
    """Every variant by name, timed in turn, ``steps`` of them in a round."""
    for step in variants.values():
        for _ in range(WARMUP_STEPS):
            step()
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in (*names[shift:], *names[:shift]):
            times[name].append(_round_ms(variants[name], steps))
    found = {}
    for name, step in variants.items():
        busy_ms, launches = _busy(step)
        own = times[name]
        found[name] = GpuTime(
            statistics.median(own), max(own) / min(own), busy_ms, launches, _peak(step)
        )
    return found

"""What a run measured, as plain numbers; times in seconds, sizes in bytes."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from fasttune.demo.protocol import StepDone

WORKERS = ("stock", "patched")


@dataclass
class WorkerRecord:
    """The measurements of one worker."""

    calibration_s: list[float] = field(default_factory=list)
    steps: list[StepDone] = field(default_factory=list)
    block_peaks_bytes: list[int] = field(default_factory=list)
    held_out_before: float | None = None
    held_out_after: float | None = None
    memory_method: str = ""

    def step_time_s(self) -> float | None:
        """Median time of an optimizer step."""
        return statistics.median(step.seconds for step in self.steps) if self.steps else None

    def peak_bytes(self) -> int | None:
        """Highest peak of all blocks, above the loaded weights."""
        return max(self.block_peaks_bytes, default=None)

    def tokens_per_s(self, step_tokens: list[int]) -> float | None:
        """Non-padding tokens of the steps done, by their time. ``step_tokens[0]`` is step 1."""
        seconds = sum(step.seconds for step in self.steps)
        return sum(step_tokens[: len(self.steps)]) / seconds if seconds > 0 else None


@dataclass
class RunRecord:
    """The measurements of a run and what they were made on."""

    model: str
    parameters: int = 0
    trainable: int = 0
    data: str = ""
    data_license: str | None = None
    n_train: int = 0
    n_held_out: int = 0
    n_truncated: int = 0
    n_dropped: int = 0
    device: str = ""
    hardware: str = ""
    dtype: str = ""
    threads: int = 0
    steps_requested: int = 0
    steps_planned: int = 0
    block_steps: int = 0
    step_tokens: list[int] = field(default_factory=list)
    interrupted: bool = False
    setup_s: float = 0.0
    run_s: float = 0.0
    question: str = ""
    reference: str = ""
    answer_before: str | None = None
    answer_after: str | None = None
    patch_report: str = ""
    notices: list[str] = field(default_factory=list)
    workers: dict[str, WorkerRecord] = field(
        default_factory=lambda: {name: WorkerRecord() for name in WORKERS}
    )

    def speedup(self) -> float | None:
        """Stock time by patched time over the steps that both did (same batches in both)."""
        stock, patched = (self.workers[name].steps for name in WORKERS)
        both = min(len(stock), len(patched))
        fast = sum(step.seconds for step in patched[:both])
        return sum(step.seconds for step in stock[:both]) / fast if fast > 0 else None

    def memory_ratio(self) -> float | None:
        """Patched peak by stock peak."""
        stock, patched = (self.workers[name].peak_bytes() for name in WORKERS)
        return patched / stock if stock and patched is not None else None


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None

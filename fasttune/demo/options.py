"""The settings of ``fasttune demo`` and what can be checked before anything is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

DTYPES = {
    "auto": "auto",
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")

DEFAULT_STEPS = 60
MIN_STEPS = 4  # fewer steps show neither a trend of the loss nor a median step time
MIN_SEQ_LEN = 8


class DemoError(Exception):
    """A problem with the user's input; ``str()`` is one line that says what to change."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the user asked for. ``None`` means: the demo decides.

    Raises:
        DemoError: a value is out of range, or the dtype or the device is unknown.
    """

    model: str | None = None  # a Hub id, a folder or a .gguf file; None: the packaged SmolLM2
    data: Path | None = None  # None: the packaged question/answer pairs
    steps: int | None = None  # None: DEFAULT_STEPS, fewer on a slow machine
    batch_size: int = 4  # samples (with packing: packed rows) per forward
    seq_len: int = 256  # longest sample in tokens; with packing, the length of a row
    grad_accum: int = 1
    packing: bool = False
    lr: float = 5e-4
    device: str = "auto"
    dtype: str = "auto"
    out: Path = Path("fasttune-demo")
    seed: int = 0
    # For both workers together, model loading excluded: below 6 minutes in all.
    budget_s: float = 270.0

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--steps", self.steps, 1),
            ("--batch-size", self.batch_size, 1),
            ("--seq-len", self.seq_len, MIN_SEQ_LEN),
            ("--grad-accum", self.grad_accum, 1),
        ):
            if value is not None and value < least:
                raise DemoError(f"{flag} must be at least {least}, not {value}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise DemoError(f"--lr must be a positive number, not {self.lr}")
        if self.dtype not in DTYPES:
            raise DemoError(f"unknown --dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if not _DEVICE.fullmatch(self.device):
            raise DemoError(f"unknown --device {self.device!r}; choose auto, cpu, cuda or cuda:N")
        if self.data is not None and not self.data.is_file():
            kind = "is not a file" if self.data.exists() else "does not exist"
            raise DemoError(f"--data {self.data} {kind}")

"""What one step of AdamW hands to a kernel, in every tier: two tables with a row per tensor.

csrc/common/adamw.h states the same columns; tests/cuda/test_shared_constants.py compares them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Columns of the table of addresses, int64; 0 where absent. LR, DECAY and STEP are addresses of
# fp32 scalars on the device of the parameters, for what the host does not know.
ADDRESSES = (
    "param",
    "grad",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "residue",
    "scales",
    "numel",
    "lr",
    "decay",
    "step",
)
# Columns of the table of facts, float64. `stream` numbers the parameter in random streams.
FACTS = ("lr", "beta1", "beta2", "eps", "decay", "step", "stream")

# Columns of the table of limits on norms, int64; the limit as the bits of a float64.
LIMITS = ("param", "residue", "numel", "limit")

# How moments are stored, by code.
MOMENTS = ("fp32", "bf16", "8bit")
_MOMENTS_OF = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "8bit"}
# How an updated parameter of 16 bits is stored, by code; fp32 takes "nearest".
ROUNDINGS = ("nearest", "master", "stochastic", "kahan")

BLOCK = 8192  # elements of one program; the rows of partial norms are one such block each
QUANTISED = 256  # elements that share a scale of 8-bit moments

# The random bits of an element: counter (element // 8, stream, step, purpose).
WEIGHT_BITS, EXP_AVG_BITS, EXP_AVG_SQ_BITS = 0, 1, 2

# 8-bit moments are floats with 3 bits of mantissa, relative to the largest magnitude of their
# block: the code is the top of an fp32 pattern, less that of the smallest exponent. exp_avg has a
# sign bit and 4 bits of exponent (down to 2^-15), exp_avg_sq 5 bits of exponent (down to 2^-31).
CODE_SHIFT = 20
SIGNED_LOWEST, UNSIGNED_LOWEST = (127 - 15) << 3, (127 - 31) << 3


class StepArguments(NamedTuple):
    """The arguments of a step in the order of the op's schema; fasttune.ops.adamw describes them.

    All tensors are contiguous, each list of one dtype; a list that is empty is not used.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    max_exp_avg_sqs: Sequence[Tensor]
    residues: Sequence[Tensor]
    scales: Sequence[Tensor]
    facts: Tensor  # [n, 7] float64 on the host
    lrs: Sequence[Tensor] = ()
    decays: Sequence[Tensor] = ()
    steps: Sequence[Tensor] = ()
    squares: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    max_grad_norm: float = math.inf
    skip_nonfinite: bool = False
    rounding: str = "nearest"
    maximize: bool = False
    seed: int = 0
    table: Tensor | None = None  # step_table of a tier, if it is on the device already

    @property
    def operands(self) -> tuple[Sequence[Tensor], ...]:
        """What the first columns of the table of addresses point to."""
        return self[:7]

    @property
    def scalars(self) -> tuple[Sequence[Tensor], ...]:
        """What the last columns of the table of addresses point to."""
        return self.lrs, self.decays, self.steps

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(Tensor.numel, self.params))

    @property
    def moments(self) -> str:
        """How a kernel stores the moments, one of MOMENTS."""
        return _MOMENTS_OF[self.exp_avgs[0].dtype]

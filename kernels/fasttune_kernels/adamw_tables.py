"""What one step of AdamW hands to a kernel, in every tier: two tables with a row per tensor.

csrc/cpu/kernels.h states the same columns; tests/ops/test_adamw.py compares them.
"""

from __future__ import annotations

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

# How moments are stored, by code.
MOMENTS = ("fp32", "bf16", "8bit")
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

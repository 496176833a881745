"""The C++ kernels: validates tensors and passes their addresses. Nothing else calls ``data_ptr``.

The primitives carry the names and arguments of ``fasttune_kernels`` (docs/design.md states them),
plus ``addend`` where a C++ kernel folds the product of the base layer into its single rounding.
One file an op.
"""

from fasttune._native._extension import (
    convert,
    cpu,
    cpu_missing,
    free_scratch,
    scratch,
)
from fasttune._native.linear_cross_entropy import cross_entropy_rows_
from fasttune._native.lora_linear import (
    MAX_RANK,
    lora_down,
    lora_down_backward,
    lora_up,
    lora_up_backward,
)

__all__ = [
    "MAX_RANK",
    "convert",
    "cpu",
    "cpu_missing",
    "cross_entropy_rows_",
    "free_scratch",
    "lora_down",
    "lora_down_backward",
    "lora_up",
    "lora_up_backward",
    "scratch",
]

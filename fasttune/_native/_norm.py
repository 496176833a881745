"""Arguments that the norms share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune._native._extension import DTYPE_CODES, cpu, room

# Rows are shared out in at most this many parts, the same whatever the number of threads, so that
# sums over the rows have one order; a part has at least MIN_ROWS rows, the price of its partial
# sum. Without such sums, a part is the few rows that a kernel takes at once.
MAX_PARTS = 64
MIN_ROWS = 16
ROWS_AT_ONCE = 4


def vector(name: str, x: Tensor | None, offset: float, cols: int) -> Any:
    """x [H] plus offset (None: one for a scale, nothing for a bias), with room for it in fp32."""
    make = cpu().NormVector
    if x is not None and x.dtype == torch.float32 and offset == 0.0:
        return make(x.data_ptr(), 0, 0.0, 0)
    converted = room(name, cols)
    if x is None:
        return make(0, 0, 0.0, converted)
    return make(x.data_ptr(), DTYPE_CODES[x.dtype], offset, converted)


def parts(rows: int, summed: bool) -> int:
    """How many parts the rows are shared out in."""
    return min(MAX_PARTS, -(-rows // MIN_ROWS)) if summed else -(-rows // ROWS_AT_ONCE)


def column_sums(name: str, wanted: bool, count: int, cols: int) -> tuple[Tensor | None, Any]:
    """The result [H] fp32 of a sum over the rows, if wanted, and what the kernel takes for it."""
    if not wanted:
        return None, cpu().ColumnSums(0, 0, count)
    out = torch.empty(cols, dtype=torch.float32)
    partial = room(name, count * cols) if count else 0
    return out, cpu().ColumnSums(out.data_ptr(), partial, count)

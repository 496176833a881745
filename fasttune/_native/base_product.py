"""Products with weights in bf16 on tiles: of LoRA's bases and of heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune._native._extension import cpu, room, threads

_FEWEST_ROWS = 64  # kFewestRows of csrc/cpu/amx/lora_blocks.h
# Packed rows of x are as many as fit the second-level cache, and for each such chunk w is packed
# again. Beyond these depths a chunk has too few rows: the vendor's product is faster there.
_DEEPEST, _DEEPEST_TRANSPOSED = 2048, 4096

Product = tuple[Tensor, Tensor]  # x [M, K] and w [K, N]


def takes_product(x: Tensor, w: Tensor, *, deep: bool = False, cast: bool = False) -> bool:
    """True if x w, x [M, K] and w [K, N], is faster as part of a product of LoRA than the vendor's:
    both bf16, on tiles. ``deep`` asks for deep_product, ``cast`` about w once it has x's dtype.
    """
    if x.dtype != torch.bfloat16 or x.shape[0] < _FEWEST_ROWS:
        return False
    if not cast and w.dtype != torch.bfloat16:
        return False
    by_rows = w.stride(1) == 1
    if not (by_rows or w.stride(0) == 1) or x.stride(1) != 1 or x.is_neg() or w.is_neg():
        return False
    deepest = _DEEPEST if by_rows else _DEEPEST_TRANSPOSED
    return (deep or x.shape[1] <= deepest) and has_base_product()


def has_base_product() -> bool:
    """True if products with base weights can run on tiles."""
    return bool(cpu().has_base_product())


def multiply(
    product: Product,  # of which takes_product is true
    runs: list[Any],
    out: Tensor,  # [M, N], fp32 or bf16
    addend: Tensor | None,
    kept: Tensor | None,
    kept_scale: int,
) -> None:
    """The rows of out that ``runs`` name: their branches, addend and x w, rounded once."""
    x, w = product
    transposed = w.stride(1) != 1
    right = w.t() if transposed else w
    cpu().base_product(x, right, transposed, runs, addend, kept, kept_scale, out, threads())


def deep_product(x: Tensor, w: Tensor) -> Tensor:
    """x w [M, N] in fp32, of any depth K, of which takes_product(deep=True) is true."""
    rows, cols = x.shape[0], w.shape[1]
    if x.shape[1] == 0:
        return torch.zeros(rows, cols)
    out = torch.empty(rows, cols)
    partial = room("deep_product", (cpu().DEEP_SUMS - 1) * rows * cols)
    transposed = w.stride(1) != 1
    right = w.t() if transposed else w
    cpu().deep_product(x, right, transposed, out, partial, threads())
    return out

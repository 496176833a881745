"""Norms of the rows of a weight with an adapter, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune._native._extension import cpu, fp32, threads
from fasttune._native.lora_linear import MAX_RANK, padded_rank, panel_of

_FEW_ROWS = 32  # kTilesOfX of csrc/cpu/amx/row_norms.cpp


def takes_row_norms(weight: Tensor, a: Tensor) -> bool:
    """True if :func:`row_norms` takes a weight [N, K] and A [R, K]."""
    fits = 0 < a.shape[0] <= MAX_RANK and weight.numel() > 0
    return fits and weight.stride(1) == 1 and not weight.is_neg()


def takes_few_rows(x: Tensor, weight: Tensor, a: Tensor) -> bool:
    """True if :func:`row_norms` multiplies x [M, K] by the weight on the way."""
    columns = padded_rank(a.shape[0]) + x.shape[0]
    return 0 < x.shape[0] <= _FEW_ROWS and x.dtype == weight.dtype and columns <= MAX_RANK


def row_norms(
    weight: Tensor,  # [N, K]
    a: Tensor,  # [R, K]
    b: Tensor,  # [N, R]
    scale: float,
    x: Tensor | None = None,  # [M, K], of which takes_few_rows is true
) -> tuple[Tensor, Tensor | None]:
    """The norms [N] fp32 of the rows of W + scale B A: the root of |w|^2 + scale <b, 2 W A^T +
    scale B A A^T>, whose W is read once; and x W^T [M, N] in fp32 from the same pass.
    """
    rank, inner, outer = a.shape[0], fp32(a), fp32(b)
    panel = panel_of(inner)
    through = torch.mm(outer, torch.mm(inner, inner.t())).mul_(scale)
    out = torch.empty(weight.shape[0], dtype=torch.float32)
    product = None if x is None else torch.empty(x.shape[0], weight.shape[0])
    cpu().row_norms(
        weight, panel.data_ptr(), rank, outer.data_ptr(), through.data_ptr(), scale,
        out.data_ptr(), x, product, threads(),
    )  # fmt: skip
    return out, product

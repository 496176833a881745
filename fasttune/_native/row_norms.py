"""Norms of the rows of a weight with an adapter, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune._native._extension import cpu, fp32, threads
from fasttune._native.lora_linear import MAX_RANK, panel_of


def takes_row_norms(weight: Tensor, a: Tensor) -> bool:
    """True if :func:`row_norms` takes a weight [N, K] and A [R, K]."""
    fits = 0 < a.shape[0] <= MAX_RANK and weight.numel() > 0
    return fits and weight.stride(1) == 1 and not weight.is_neg()


def row_norms(
    weight: Tensor,  # [N, K]
    a: Tensor,  # [R, K]
    b: Tensor,  # [N, R]
    scale: float,
) -> Tensor:
    """The norms [N] fp32 of the rows of W + scale B A: the root of |w|^2 + scale <b, 2 W A^T +
    scale B A A^T>, whose W is read once.
    """
    rank, inner, outer = a.shape[0], fp32(a), fp32(b)
    panel = panel_of(inner)
    through = (outer @ (inner @ inner.t())).mul_(scale)
    out = torch.empty(weight.shape[0], dtype=torch.float32)
    cpu().row_norms(
        weight, panel.data_ptr(), rank, outer.data_ptr(), through.data_ptr(), scale,
        out.data_ptr(), threads(),
    )  # fmt: skip
    return out

"""The gradients of (IA)^3's scale, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune._native import _norm
from fasttune._native._extension import cpu, fp32, threads


def ia3_scale_backward(
    dy: Tensor,  # [M, N]
    x: Tensor,  # [M, N]
    scale: Tensor,  # [N]
    *,
    need_dx: bool,
    out: Tensor | None = None,  # [M, N] of dy.dtype
) -> tuple[Tensor | None, Tensor]:
    """dx [M, N] = dy scale in dy.dtype (None where not needed), written into ``out`` if given, and
    dscale [N] fp32 = sum_m dy x.
    """
    rows, cols = x.shape
    dx = None
    if need_dx:
        dx = torch.empty(rows, cols, dtype=dy.dtype) if out is None else out
    factors = fp32(scale)
    dscale, sums = _norm.column_sums("ia3_dscale", True, _norm.parts(rows, True), cols)
    assert dscale is not None
    cpu().ia3_scale_backward(
        dy,
        x,
        factors.data_ptr(),
        dx,
        sums,
        threads(),
    )
    return dx, dscale

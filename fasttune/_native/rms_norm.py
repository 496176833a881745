"""RMS normalisation of rows, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune._native import _norm
from fasttune._native._extension import cpu, threads


def rms_norm_forward(
    x: Tensor,  # [M, H]
    weight: Tensor | None,  # [H]
    *,
    eps: float,
    weight_offset: float,
    round_first: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y [M, H] and rstd [M] fp32; docs/design.md states the formulas."""
    return _forward(x, None, None, weight, eps, weight_offset, round_first, out_dtype)


def add_rms_norm_forward(
    x: Tensor,  # [M, H]
    residual: Tensor,  # [M, H]
    weight: Tensor | None,  # [H]
    *,
    eps: float,
    weight_offset: float,
    round_first: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [M, H], s [M, H] = x + residual in x.dtype, and rstd [M] fp32."""
    s = torch.empty(x.shape, dtype=x.dtype)
    y, rstd = _forward(x, residual, s, weight, eps, weight_offset, round_first, out_dtype)
    return y, s, rstd


def _forward(
    x: Tensor,
    residual: Tensor | None,
    s: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    rows, cols = x.shape
    y = torch.empty(rows, cols, dtype=out_dtype)
    rstd = torch.empty(rows, dtype=torch.float32)
    cpu().rms_norm_forward(
        x,
        residual,
        s,
        _norm.vector("norm_scale", weight, weight_offset, cols),
        eps,
        round_first,
        y,
        rstd.data_ptr(),
        threads(),
    )
    return y, rstd


def rms_norm_backward(
    dy: Tensor,  # [M, H]
    x: Tensor,  # [M, H]
    weight: Tensor | None,  # [H]
    rstd: Tensor,  # [M] fp32
    addend: Tensor | None,  # [M, H] in x.dtype
    *,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, H] in x.dtype with addend added, dweight [H] fp32; None where not needed."""
    rows, cols = x.shape
    dx = torch.empty(rows, cols, dtype=x.dtype) if need_dx else None
    count = _norm.parts(rows, need_dweight)
    dweight, sums = _norm.column_sums("norm_dweight", need_dweight, count, cols)
    cpu().rms_norm_backward(
        dy,
        x,
        _norm.vector("norm_scale", weight, weight_offset, cols),
        rstd.data_ptr(),
        addend,
        dx,
        sums,
        threads(),
    )
    return dx, dweight

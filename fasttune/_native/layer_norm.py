"""Layer normalisation of rows, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune._native import _norm
from fasttune._native._extension import cpu, threads


def layer_norm_forward(
    x: Tensor,  # [M, H]
    weight: Tensor | None,  # [H]
    bias: Tensor | None,  # [H]
    *,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [M, H], mean [M] and rstd [M] fp32; docs/design.md states the formulas."""
    return _forward(x, None, None, weight, bias, eps, weight_offset, out_dtype)


def add_layer_norm_forward(
    x: Tensor,  # [M, H]
    residual: Tensor,  # [M, H]
    weight: Tensor | None,  # [H]
    bias: Tensor | None,  # [H]
    *,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [M, H], s [M, H] = x + residual in x.dtype, mean [M] and rstd [M] fp32."""
    s = torch.empty(x.shape, dtype=x.dtype)
    y, mean, rstd = _forward(x, residual, s, weight, bias, eps, weight_offset, out_dtype)
    return y, s, mean, rstd


def _forward(
    x: Tensor,
    residual: Tensor | None,
    s: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = x.shape
    y = torch.empty(rows, cols, dtype=out_dtype)
    mean = torch.empty(rows, dtype=torch.float32)
    rstd = torch.empty(rows, dtype=torch.float32)
    cpu().layer_norm_forward(
        x,
        residual,
        s,
        _norm.vector("norm_scale", weight, weight_offset, cols),
        _norm.vector("norm_shift", bias, 0.0, cols),
        eps,
        y,
        mean.data_ptr(),
        rstd.data_ptr(),
        threads(),
    )
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor,  # [M, H]
    x: Tensor,  # [M, H]
    weight: Tensor | None,  # [H]
    mean: Tensor,  # [M] fp32
    rstd: Tensor,  # [M] fp32
    addend: Tensor | None,  # [M, H] in x.dtype
    *,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx [M, H] in x.dtype with addend added, dweight and dbias [H] fp32; None where not needed."""
    rows, cols = x.shape
    dx = torch.empty(rows, cols, dtype=x.dtype) if need_dx else None
    count = _norm.parts(rows, need_dweight or need_dbias)
    dweight, weight_sums = _norm.column_sums("norm_dweight", need_dweight, count, cols)
    dbias, bias_sums = _norm.column_sums("norm_dbias", need_dbias, count, cols)
    cpu().layer_norm_backward(
        dy,
        x,
        _norm.vector("norm_scale", weight, weight_offset, cols),
        mean.data_ptr(),
        rstd.data_ptr(),
        addend,
        dx,
        weight_sums,
        bias_sums,
        threads(),
    )
    return dx, dweight, dbias

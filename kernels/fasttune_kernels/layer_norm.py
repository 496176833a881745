"""Layer normalisation of rows, alone or after an addition, and its gradients.

Legend: M rows, H features. scale = weight_offset + weight, or 1; n = (x - mean) rstd.

    layer_norm_forward       mean(x), rstd = 1 / sqrt(var(x) + eps), y = n scale + bias
    add_layer_norm_forward   s = x + residual, then the same of s
    layer_norm_backward      dx = rstd (g - mean(g) - n mean(g n)) + addend with g = dy scale,
                             dweight = dy^T n, dbias = sum of dy

A program holds whole rows in registers, so every operand is read once and the variance is that of
the deviations from the mean. Arithmetic is fp32; see `rms_norm`, whose tiles these kernels share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .norm_columns import column_sums
from .norm_tables import gradient_tile, persistent_programs, register_limit, row_tile, sums_tile
from .partials import sum_rows
from .tables import divide_up, gpu_of, launch_device


# Floor: as `_rms_norm_forward_kernel`, with 4 M more of mean.
@triton.jit(do_not_specialize=["M"])
def _layer_norm_forward_kernel(
    x_ptr,  # [M, H], columns adjacent
    residual_ptr,  # [M, H], columns adjacent, or None
    weight_ptr,  # [H] or None
    bias_ptr,  # [H] or None
    s_ptr,  # [M, H], None without a residual
    y_ptr,  # [M, H]
    mean_ptr,  # [M] fp32
    rstd_ptr,  # [M] fp32
    eps,
    weight_offset,
    M,
    H,
    stride_xm: tl.int64,
    stride_rm: tl.int64,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = row[:, None]
    column = tl.arange(0, BLOCK_H)
    columns = column[None, :]
    inside = (rows < M) & (columns < H)
    x = tl.load(x_ptr + rows * stride_xm + columns, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + rows * stride_rm + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + rows * H + columns, x, mask=inside)
    wide = x.to(tl.float32)
    features = tl.cast(H, tl.float32)
    mean = tl.div_rn(tl.sum(wide, 1), features)
    deviation = tl.where(columns < H, wide - mean[:, None], 0.0)
    variance = tl.div_rn(tl.sum(deviation * deviation, 1), features)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    tl.store(mean_ptr + row, mean, mask=row < M)
    tl.store(rstd_ptr + row, rstd, mask=row < M)
    y = deviation * rstd[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < H, other=0.0)[None, :]
        y = y * (weight_offset + weight.to(tl.float32))
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < H, other=0.0)[None, :].to(tl.float32)
    tl.store(y_ptr + rows * H + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


# Floor: as `_rms_norm_backward_kernel`, with 4 H more a program for dbias.
@triton.jit(do_not_specialize=["M"])
def _layer_norm_backward_kernel(
    dy_ptr,  # [M, H], columns adjacent
    x_ptr,  # [M, H], columns adjacent
    weight_ptr,  # [H] or None
    mean_ptr,  # [M] fp32
    rstd_ptr,  # [M] fp32
    addend_ptr,  # [M, H], columns adjacent, or None
    dx_ptr,  # [M, H]
    dweight_ptr,  # [programs, H] fp32 or None
    dbias_ptr,  # [programs, H] fp32 or None
    weight_offset,
    per_feature,  # 1 / H: a correctly rounded division is a call that costs registers
    M,
    H,
    stride_dym: tl.int64,
    stride_xm: tl.int64,
    stride_am: tl.int64,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    columns = column[None, :]
    weighted = tl.zeros((1, BLOCK_H), dtype=tl.float32)
    plain = tl.zeros((1, BLOCK_H), dtype=tl.float32)
    step = tl.num_programs(0) * BLOCK_M
    for first in tl.range(program * BLOCK_M, M, step, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_M)
        rows = row[:, None]
        inside = (rows < M) & (columns < H)
        dy = tl.load(dy_ptr + rows * stride_dym + columns, mask=inside, other=0.0)
        x = tl.load(x_ptr + rows * stride_xm + columns, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + row, mask=row < M, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)[:, None]
        g = dy.to(tl.float32)
        n = (x.to(tl.float32) - mean) * rstd
        if dweight_ptr is not None:
            weighted += tl.sum(g * n, 0, keep_dims=True)
        if dbias_ptr is not None:
            plain += tl.sum(g, 0, keep_dims=True)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + column, mask=column < H, other=0.0)[None, :]
            g = g * (weight_offset + weight.to(tl.float32))
        # mean(n) = 0, so the mean of g may go before the second sum: one row less in registers.
        g = tl.where(columns < H, g - tl.sum(g, 1, keep_dims=True) * per_feature, 0.0)
        dx = rstd * (g - n * (tl.sum(g * n, 1, keep_dims=True) * per_feature))
        if addend_ptr is not None:
            addend = tl.load(addend_ptr + rows * stride_am + columns, mask=inside, other=0.0)
            dx += addend.to(tl.float32)
        tl.store(dx_ptr + rows * H + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * H + columns, weighted, mask=columns < H)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * H + columns, plain, mask=columns < H)


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
    m, h = x.shape
    y = x.new_empty((m, h), dtype=out_dtype)
    mean = x.new_empty(m, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if m == 0:
        return y, mean, rstd
    tile = row_tile(h)
    with launch_device(x):
        launch(
            _layer_norm_forward_kernel,
            (divide_up(m, tile.rows),),
            x,
            residual,
            weight,
            bias,
            s,
            y,
            mean,
            rstd,
            float(eps),
            float(weight_offset),
            m,
            h,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            BLOCK_M=tile.rows,
            BLOCK_H=tile.columns,
            num_warps=tile.warps,
            maxnreg=register_limit(tile),
            enable_fp_fusion=True,
        )
    return y, mean, rstd


def layer_norm_forward(
    x: Tensor,  # [M, H] fp32 / bf16 / fp16, unit column stride
    weight: Tensor | None,  # [H], any of the dtypes
    bias: Tensor | None,  # [H], any of the dtypes
    *,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y [M, H] in `out_dtype`, mean [M] and rstd [M] fp32."""
    return _forward(x, None, None, weight, bias, eps, weight_offset, out_dtype)


def add_layer_norm_forward(
    x: Tensor,  # [M, H] fp32 / bf16 / fp16, unit column stride
    residual: Tensor,  # [M, H], any of the dtypes, unit column stride
    weight: Tensor | None,  # [H], any of the dtypes
    bias: Tensor | None,  # [H], any of the dtypes
    *,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y [M, H] in `out_dtype`, s [M, H] = x + residual in x.dtype, mean [M], rstd [M] fp32."""
    s = x.new_empty(x.shape)
    y, mean, rstd = _forward(x, residual, s, weight, bias, eps, weight_offset, out_dtype)
    return y, s, mean, rstd


def layer_norm_backward(
    dy: Tensor,  # [M, H] fp32 / bf16 / fp16, unit column stride
    x: Tensor,  # [M, H], any of the dtypes, unit column stride
    weight: Tensor | None,  # [H]
    mean: Tensor,  # [M] fp32
    rstd: Tensor,  # [M] fp32
    addend: Tensor | None,  # [M, H] in x.dtype, unit column stride
    *,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> dx [M, H] in x.dtype with `addend` added, dweight and dbias [H] fp32; None if not
    needed.
    """
    m, h = x.shape
    wanted = (need_dweight, need_dbias)
    if m == 0:
        zeros = (rstd.new_zeros(h) if need else None for need in wanted)
        return x.new_empty((m, h)) if need_dx else None, *zeros
    separate = dict(need_dweight=need_dweight, need_dbias=need_dbias)
    if not need_dx:
        return None, *column_sums(dy, x, mean, rstd, **separate)
    dx = x.new_empty((m, h))
    gpu = gpu_of(x)
    tile = gradient_tile(h)
    partials: list[Tensor | None] = [None, None]
    if any(wanted):
        operands = sum(t.element_size() for t in (dy, x, addend) if t is not None)
        summed = sums_tile(gpu.capability, h, operands)
        if summed is not None:
            tile = summed
            shape = (persistent_programs(gpu, m, tile), h)
            partials = [rstd.new_empty(shape) if need else None for need in wanted]
    given = next((partial for partial in partials if partial is not None), None)
    programs = divide_up(m, tile.rows) if given is None else given.shape[0]
    with launch_device(x):
        launch(
            _layer_norm_backward_kernel,
            (programs,),
            dy,
            x,
            weight,
            mean,
            rstd,
            addend,
            dx,
            *partials,
            float(weight_offset),
            1.0 / h,
            m,
            h,
            dy.stride(0),
            x.stride(0),
            0 if addend is None else addend.stride(0),
            BLOCK_M=tile.rows,
            BLOCK_H=tile.columns,
            STAGES=tile.stages,
            num_warps=tile.warps,
            maxnreg=register_limit(tile),
            enable_fp_fusion=True,
        )
        if given is not None:
            return dx, *(None if partial is None else sum_rows(partial) for partial in partials)
    if not any(wanted):
        return dx, None, None
    return dx, *column_sums(dy, x, mean, rstd, **separate)

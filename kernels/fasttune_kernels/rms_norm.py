"""RMS normalisation of rows, alone or after an addition, and its gradients.

Legend: M rows, H features. scale = weight_offset + weight, or 1; n = x rstd.

    rms_norm_forward       rstd = 1 / sqrt(mean(x^2) + eps), y = n scale
    add_rms_norm_forward   s = x + residual, then the same of s
    rms_norm_backward      dx = rstd (g - n mean(g n)) + addend with g = dy scale, dweight = dy^T n

A program holds whole rows in registers, so every operand is read once. Arithmetic is fp32. The
square root and the divisions by it are rounded correctly: one a row, so they cost nothing.
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


# Floor: read M H of x (and of the residual), write M H of y (and of s), 4 M of rstd; the weight
# stays in L1 / L2. About 4 operations an element: memory binds. Whole rows in registers, 16 bytes a
# load, several programs a multiprocessor to keep loads in flight while others reduce.
@triton.jit(do_not_specialize=["M"])
def _rms_norm_forward_kernel(
    x_ptr,  # [M, H], columns adjacent
    residual_ptr,  # [M, H], columns adjacent, or None
    weight_ptr,  # [H] or None
    s_ptr,  # [M, H], None without a residual
    y_ptr,  # [M, H]
    rstd_ptr,  # [M] fp32
    eps,
    weight_offset,
    M,
    H,
    stride_xm: tl.int64,
    stride_rm: tl.int64,
    ROUND_FIRST: tl.constexpr,
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
    variance = tl.div_rn(tl.sum(wide * wide, 1), tl.cast(H, tl.float32))
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    tl.store(rstd_ptr + row, rstd, mask=row < M)
    y = wide * rstd[:, None]
    if ROUND_FIRST:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < H, other=0.0)[None, :]
        y = y * (weight_offset + weight.to(tl.float32))
    tl.store(y_ptr + rows * H + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


# Floor: read M H of dy and of x (and of the addend), write M H of dx; about 10 operations an
# element. With dweight the programs are persistent and add dy n over their rows in registers: 4 H a
# program beside that, and a second pass over those. Otherwise a program takes one block of rows.
@triton.jit(do_not_specialize=["M"])
def _rms_norm_backward_kernel(
    dy_ptr,  # [M, H], columns adjacent
    x_ptr,  # [M, H], columns adjacent
    weight_ptr,  # [H] or None
    rstd_ptr,  # [M] fp32
    addend_ptr,  # [M, H], columns adjacent, or None
    dx_ptr,  # [M, H]
    dweight_ptr,  # [programs, H] fp32 or None
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
    sums = tl.zeros((1, BLOCK_H), dtype=tl.float32)
    step = tl.num_programs(0) * BLOCK_M
    for first in tl.range(program * BLOCK_M, M, step, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_M)
        rows = row[:, None]
        inside = (rows < M) & (columns < H)
        dy = tl.load(dy_ptr + rows * stride_dym + columns, mask=inside, other=0.0)
        x = tl.load(x_ptr + rows * stride_xm + columns, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)[:, None]
        g = dy.to(tl.float32)
        n = x.to(tl.float32) * rstd
        if dweight_ptr is not None:
            sums += tl.sum(g * n, 0, keep_dims=True)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + column, mask=column < H, other=0.0)[None, :]
            g = g * (weight_offset + weight.to(tl.float32))
        mean = tl.sum(g * n, 1, keep_dims=True) * per_feature
        dx = rstd * (g - n * mean)
        if addend_ptr is not None:
            addend = tl.load(addend_ptr + rows * stride_am + columns, mask=inside, other=0.0)
            dx += addend.to(tl.float32)
        tl.store(dx_ptr + rows * H + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * H + columns, sums, mask=columns < H)


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
    m, h = x.shape
    y = x.new_empty((m, h), dtype=out_dtype)
    rstd = x.new_empty(m, dtype=torch.float32)
    if m == 0:
        return y, rstd
    tile = row_tile(h)
    with launch_device(x):
        launch(
            _rms_norm_forward_kernel,
            (divide_up(m, tile.rows),),
            x,
            residual,
            weight,
            s,
            y,
            rstd,
            float(eps),
            float(weight_offset),
            m,
            h,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            ROUND_FIRST=round_first,
            BLOCK_M=tile.rows,
            BLOCK_H=tile.columns,
            num_warps=tile.warps,
            maxnreg=register_limit(tile),
            enable_fp_fusion=True,
        )
    return y, rstd


def rms_norm_forward(
    x: Tensor,  # [M, H] fp32 / bf16 / fp16, unit column stride
    weight: Tensor | None,  # [H], any of the dtypes
    *,
    eps: float,
    weight_offset: float,
    round_first: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """-> y [M, H] in `out_dtype`, rstd [M] fp32; `round_first` rounds n to x.dtype."""
    return _forward(x, None, None, weight, eps, weight_offset, round_first, out_dtype)


def add_rms_norm_forward(
    x: Tensor,  # [M, H] fp32 / bf16 / fp16, unit column stride
    residual: Tensor,  # [M, H], any of the dtypes, unit column stride
    weight: Tensor | None,  # [H], any of the dtypes
    *,
    eps: float,
    weight_offset: float,
    round_first: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y [M, H] in `out_dtype`, s [M, H] = x + residual in x.dtype, rstd [M] fp32."""
    s = x.new_empty(x.shape)
    y, rstd = _forward(x, residual, s, weight, eps, weight_offset, round_first, out_dtype)
    return y, s, rstd


def rms_norm_backward(
    dy: Tensor,  # [M, H] fp32 / bf16 / fp16, unit column stride
    x: Tensor,  # [M, H], any of the dtypes, unit column stride
    weight: Tensor | None,  # [H]
    rstd: Tensor,  # [M] fp32
    addend: Tensor | None,  # [M, H] in x.dtype, unit column stride
    *,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """-> dx [M, H] in x.dtype with `addend` added, dweight [H] fp32; None where not needed."""
    m, h = x.shape
    if m == 0:
        zeros = rstd.new_zeros(h) if need_dweight else None
        return x.new_empty((m, h)) if need_dx else None, zeros
    if not need_dx:
        sums = column_sums(dy, x, None, rstd, need_dweight=need_dweight, need_dbias=False)
        return None, sums[0]
    dx = x.new_empty((m, h))
    gpu = gpu_of(x)
    tile = gradient_tile(h)
    partial = None
    if need_dweight:
        operands = sum(t.element_size() for t in (dy, x, addend) if t is not None)
        summed = sums_tile(gpu.capability, h, operands)
        if summed is not None:
            tile = summed
            partial = rstd.new_empty((persistent_programs(gpu, m, tile), h))
    programs = divide_up(m, tile.rows) if partial is None else partial.shape[0]
    with launch_device(x):
        launch(
            _rms_norm_backward_kernel,
            (programs,),
            dy,
            x,
            weight,
            rstd,
            addend,
            dx,
            partial,
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
        if partial is not None:
            return dx, sum_rows(partial)
    if not need_dweight:
        return dx, None
    return dx, column_sums(dy, x, None, rstd, need_dweight=True, need_dbias=False)[0]

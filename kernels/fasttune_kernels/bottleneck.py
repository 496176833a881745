"""A bottleneck adapter in two kernels forward and three backward.

Legend: M rows (tokens), K features of x, H of the output, R inside, at most 128, F the wide one of
a kernel. C is the compute dtype, bf16 or fp16; keep is the mask of `philox`. For tensor cores.

    squeeze           x D^T                      reads the wide x, writes thin sums
    widen             z = sums + b_D, h = act(z), y = residual + keep scale (h U^T + b_U)
    squeeze           (keep dy) (scale U)        reads the wide dy
    widen             dz = sums act'(z), dx = dy + dz D
    weight gradients  dU = (keep dy)^T h and dD = dz^T x, with the sums over the rows of both

The sums of a squeeze are fp32 and may be cut into parts, which the widening kernel adds in fixed
order: so there is no launch between the two, and thin values are computed by every program that
needs them. A program of it takes many columns, so that this is little.

Precision: operands in C, sums in fp32, z, h, dz in C (as `fasttune.ops.bottleneck` says); y, dx and
every gradient are rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_with_slope
from .bottleneck_tables import column_groups, outer_tile, squeeze_tile, widen_tile
from .launch import launch
from .lora_tables import feature_splits, rank_block, row_splits
from .partials import sum_group_partials
from .philox import keep_mask, load_philox_key
from .tables import MAX_REGISTERS, divide_up, gpu_of, launch_device, next_power_of_2

_MANY = 1 << 24  # elements of a wide operand: below, the host's time counts
_COMPUTE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# Floor: read M F of x once, R F of the weight (stays in L2), write 4 M R; 2 M F R operations: at
# width 64 in bf16 64 an element of 2 bytes, a tenth of what an H100 does in the time of the read.
@triton.jit(do_not_specialize=["M", "threshold"])
def _squeeze_kernel(
    x_ptr,  # [M, F], columns adjacent
    weight_ptr,  # [R, F] by strides
    scale_ptr,  # [F] by its stride, or None
    partial_ptr,  # [splits, M, R] fp32
    seed_ptr,  # 0-d int64 or None
    threshold,
    M,
    F,
    stride_xm: tl.int64,
    stride_wr,
    stride_wf,
    stride_scale,
    features_per_split,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    rank_blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    # Programs that read the same rows of x are neighbours, so that the second read hits L2.
    rows = (tl.program_id(0) // rank_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = (tl.program_id(0) % rank_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    inside_m = rows < M
    inside_r = ranks < R
    if seed_ptr is not None:
        key0, key1 = load_philox_key(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    begin = split * features_per_split
    end = tl.minimum(begin + features_per_split, F)
    for f0 in range(begin, end, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        inside_f = f < F
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + f[None, :],
            mask=inside_m[:, None] & inside_f[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr
            + ranks.to(tl.int64)[None, :] * stride_wr
            + f.to(tl.int64)[:, None] * stride_wf,
            mask=inside_f[:, None] & inside_r[None, :],
            other=0.0,
        )
        if seed_ptr is not None:
            branch = f0 * 0
            keep = keep_mask(rows, f0, key0, key1, branch, threshold, BLOCK_M, BLOCK_F)
            x = tl.where(keep, x, 0.0)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + f * stride_scale, mask=inside_f, other=0.0)
            weight = weight.to(tl.float32) * scale.to(tl.float32)[:, None]
        acc = tl.dot(x.to(COMPUTE), weight.to(COMPUTE), acc)
    partial_ptr += split.to(tl.int64) * M * R
    tl.store(
        partial_ptr + rows[:, None] * R + ranks[None, :],
        acc,
        mask=inside_m[:, None] & inside_r[None, :],
    )


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    return z if ACTIVATION == "identity" else activate(z.to(tl.float32), ACTIVATION).to(z.dtype)


# Floor: write M F of y, and read M F of the addend if there is one; the rest is thin or stays in
# L2. The thin values of a program are its first 4 splits BLOCK_M R bytes from L2, against at least
# 4 BLOCK_M F / groups of wide ones.
@triton.jit(do_not_specialize=["M", "splits", "stride_split", "threshold"])
def _widen_kernel(
    partial_ptr,  # [splits, M, R] fp32
    inner_bias_ptr,  # [R] or None
    z_ptr,  # [M, R] in C: written forward, read backward
    dz_ptr,  # [M, R] in C, or None forward
    h_ptr,  # [M, R] in C, or None: not wanted
    weight_ptr,  # [F, R] by strides
    bias_ptr,  # [F] or None
    scale_ptr,  # [F] by its stride, or None
    addend_ptr,  # [M, F], columns adjacent, or None
    y_ptr,  # [M, F]
    seed_ptr,  # 0-d int64 or None
    threshold,
    factor,
    M,
    F,
    splits,
    stride_split: tl.int64,
    stride_addend: tl.int64,
    stride_wf,
    stride_wr,
    stride_scale,
    features_per_program,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    inside_m = rows < M
    inside_r = ranks < R
    thin = rows[:, None] * R + ranks[None, :]
    inside = inside_m[:, None] & inside_r[None, :]
    compute = z_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for _ in range(splits):
        acc += tl.load(partial_ptr + thin, mask=inside, other=0.0)
        partial_ptr += stride_split
    if BACKWARD:
        z = tl.load(z_ptr + thin, mask=inside, other=0.0)
        inner = acc * factor
        if ACTIVATION != "identity":
            _, slope = activate_with_slope(z.to(tl.float32), ACTIVATION)
            inner *= slope
        operand = inner.to(compute)
        if group == 0:
            tl.store(dz_ptr + thin, operand, mask=inside)
            if h_ptr is not None:
                tl.store(h_ptr + thin, _activated(z, ACTIVATION), mask=inside)
    else:
        if inner_bias_ptr is not None:
            inner_bias = tl.load(inner_bias_ptr + ranks, mask=inside_r, other=0.0)
            acc += inner_bias.to(compute).to(tl.float32)[None, :]
        z = acc.to(compute)
        operand = tl.where(inside_r[None, :], _activated(z, ACTIVATION), 0.0)
        if group == 0:
            tl.store(z_ptr + thin, z, mask=inside)
    if seed_ptr is not None:
        key0, key1 = load_philox_key(seed_ptr)
    begin = group * features_per_program
    end = tl.minimum(begin + features_per_program, F)
    for f0 in tl.range(begin, end, BLOCK_F, num_stages=STAGES):
        f = f0 + tl.arange(0, BLOCK_F)
        inside_f = f < F
        wide = inside_m[:, None] & inside_f[None, :]
        weight = tl.load(
            weight_ptr
            + ranks.to(tl.int64)[:, None] * stride_wr
            + f.to(tl.int64)[None, :] * stride_wf,
            mask=inside_r[:, None] & inside_f[None, :],
            other=0.0,
        )
        y = tl.dot(operand, weight.to(compute))
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + f, mask=inside_f, other=0.0)
            y += bias.to(compute).to(tl.float32)[None, :]
        if not BACKWARD:
            y *= factor
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + f * stride_scale, mask=inside_f, other=0.0)
            y *= scale.to(tl.float32)[None, :]
        if seed_ptr is not None:
            branch = f0 * 0
            keep = keep_mask(rows, f0, key0, key1, branch, threshold, BLOCK_M, BLOCK_F)
            y = tl.where(keep, y, 0.0)
        if addend_ptr is not None:
            addend = tl.load(
                addend_ptr + rows[:, None] * stride_addend + f[None, :], mask=wide, other=0.0
            )
            y += addend.to(tl.float32)
        tl.store(y_ptr + rows[:, None] * F + f[None, :], y.to(y_ptr.dtype.element_ty), mask=wide)


@triton.jit
def _outer(
    wide_ptr,  # [M, F], columns adjacent
    thin_ptr,  # [M, R] in C
    out_ptr,  # F by R by strides, or None
    wide_sum_ptr,  # [F] or None
    thin_sum_ptr,  # [R] or None
    seed_ptr,
    threshold,
    factor,
    pid,
    begin,
    end,
    M,
    F,
    stride_wide,
    stride_of,
    stride_or,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """The rows begin .. end of factor (keep wide)^T thin and of the sums over the rows."""
    rank_blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    block_f = pid // rank_blocks
    block_r = pid % rank_blocks
    f = block_f * BLOCK_F + tl.arange(0, BLOCK_F)
    ranks = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_f = f < F
    inside_r = ranks < R
    if seed_ptr is not None:
        key0, key1 = load_philox_key(seed_ptr)
    acc = tl.zeros((BLOCK_R, BLOCK_F), dtype=tl.float32)
    # Sums over the rows are products with ones, 16 times over: a reduction among threads at each
    # step takes three quarters of the time of the rest (H200, width 64).
    wide_sum = tl.zeros((16, BLOCK_F), dtype=tl.float32)
    thin_sum = tl.zeros((BLOCK_R, 16), dtype=tl.float32)
    for m0 in range(begin, end, BLOCK_M):
        rows = m0 + tl.arange(0, BLOCK_M)
        inside_m = rows < M
        wide = tl.load(
            wide_ptr + rows[:, None] * stride_wide + f[None, :],
            mask=inside_m[:, None] & inside_f[None, :],
            other=0.0,
        )
        thin = tl.load(
            thin_ptr + rows[None, :] * R + ranks[:, None],
            mask=inside_m[None, :] & inside_r[:, None],
            other=0.0,
        )
        if seed_ptr is not None:
            branch = block_f * 0
            keep = keep_mask(
                rows, block_f * BLOCK_F, key0, key1, branch, threshold, BLOCK_M, BLOCK_F
            )
            wide = tl.where(keep, wide, 0.0)
        wide = wide.to(thin_ptr.dtype.element_ty)
        if out_ptr is not None:
            acc = tl.dot(thin, wide, acc)
        if wide_sum_ptr is not None:
            wide_sum = tl.dot(tl.full((16, BLOCK_M), 1.0, wide.dtype), wide, wide_sum)
        if thin_sum_ptr is not None:
            thin_sum = tl.dot(thin, tl.full((BLOCK_M, 16), 1.0, wide.dtype), thin_sum)
    if out_ptr is not None:
        tl.store(
            out_ptr + f.to(tl.int64)[None, :] * stride_of + ranks.to(tl.int64)[:, None] * stride_or,
            (acc * factor).to(out_ptr.dtype.element_ty),
            mask=inside_r[:, None] & inside_f[None, :],
        )
    if wide_sum_ptr is not None:  # noqa: SIM102 (known when it is compiled)
        if block_r == 0:
            total = (tl.sum(wide_sum, 0) * (factor / 16)).to(wide_sum_ptr.dtype.element_ty)
            tl.store(wide_sum_ptr + f, total, mask=inside_f)
    if thin_sum_ptr is not None:  # noqa: SIM102
        if block_f == 0:
            total = (tl.sum(thin_sum, 1) / 16).to(thin_sum_ptr.dtype.element_ty)
            tl.store(thin_sum_ptr + ranks, total, mask=inside_r)


# Floor: read M H of dy and M K of x once, and 2 M R twice (L2), write R (H + K); 2 M R (H + K)
# operations. The wide operand is the right one, as it lies in memory. The rows are split to fill
# the multiprocessors; partial sums are 4 R (H + K) each.
@triton.jit(do_not_specialize=["M", "threshold", "up_programs"])
def _weight_gradients_kernel(
    dy_ptr,  # [M, H], columns adjacent
    h_ptr,  # [M, R] in C
    dup_ptr,  # [splits, H, R] or None
    dup_bias_ptr,  # [splits, H] or None
    x_ptr,  # [M, K], columns adjacent
    dz_ptr,  # [M, R] in C
    ddown_ptr,  # [splits, R, K] or None
    ddown_bias_ptr,  # [splits, R] or None
    seed_ptr,  # 0-d int64 or None
    threshold,
    factor,
    M,
    H,
    K,
    stride_dym: tl.int64,
    stride_xm: tl.int64,
    up_programs,  # the first ones, 0 if nothing of U is wanted
    rows_per_split,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    pid = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, M)
    if pid < up_programs:
        if dup_ptr is not None:
            dup_ptr += split * H * R
        if dup_bias_ptr is not None:
            dup_bias_ptr += split * H
        _outer(
            dy_ptr, h_ptr, dup_ptr, dup_bias_ptr, None, seed_ptr, threshold, factor, pid, begin,
            end, M, H, stride_dym, R, 1, R, BLOCK_R, BLOCK_M, BLOCK_F,
        )  # fmt: skip
    else:
        if ddown_ptr is not None:
            ddown_ptr += split * R * K
        if ddown_bias_ptr is not None:
            ddown_bias_ptr += split * R
        _outer(
            x_ptr, dz_ptr, ddown_ptr, None, ddown_bias_ptr, None, threshold, 1.0, pid - up_programs,
            begin, end, M, K, stride_xm, 1, K, R, BLOCK_R, BLOCK_M, BLOCK_F,
        )  # fmt: skip


def _operands(down: Tensor, up: Tensor, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weights, converted first where programs would lose more by tiles of fp32, which are
    narrow, than that takes (H200: 0.39 against 0.24 ms for 8192 x 4096, width 128).
    """
    width, k = down.shape
    if width <= 64 and rows * max(k, up.shape[0]) < _MANY:
        return down, up
    return down.to(dtype), up.to(dtype)


def _squeeze(
    x: Tensor,  # [M, F], unit column stride
    weight: Tensor,  # [R, F], any strides
    scale: Tensor | None,  # [1] or [F]
    dtype: torch.dtype,
    seed: Tensor | None,
    threshold: int,
) -> Tensor:  # [splits, M, R] fp32
    m, features = x.shape
    r = weight.shape[0]
    gpu = gpu_of(x)
    block_r = rank_block(r)
    tile = squeeze_tile(gpu.capability, x.dtype, weight.dtype, block_r)
    programs = divide_up(m, tile.rows) * divide_up(r, block_r)
    splits, each = feature_splits(gpu, features, programs, tile)
    partial = x.new_empty((splits, m, r), dtype=torch.float32)
    launch(
        _squeeze_kernel,
        (programs, splits),
        x,
        weight,
        scale,
        partial,
        seed if threshold else None,
        threshold,
        m,
        features,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        _stride_of(scale),
        each,
        R=r,
        BLOCK_R=block_r,
        BLOCK_M=tile.rows,
        BLOCK_F=tile.columns,
        COMPUTE=_COMPUTE[dtype],
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=MAX_REGISTERS,
        enable_fp_fusion=True,
    )
    return partial


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _stride_of(scale: Tensor | None) -> int:
    return 0 if scale is None or scale.shape[0] == 1 else 1


@dataclass(frozen=True)
class _Thin:
    """The thin tensors of a widening launch, [M, R] in C."""

    z: Tensor
    dz: Tensor | None = None  # backward
    h: Tensor | None = None  # backward, if wanted


def _widen(
    partial: Tensor,  # [splits, M, R] fp32
    inner_bias: Tensor | None,  # [R]
    thin: _Thin,
    weight: Tensor,  # [F, R], any strides
    bias: Tensor | None,  # [F]
    scale: Tensor | None,  # [1] or [F]
    factor: float,
    activation: str,
    addend: Tensor | None,  # [M, F], unit column stride
    y: Tensor,  # [M, F] contiguous; [M, 0] if only the thin tensors are wanted
    seed: Tensor | None,
    threshold: int,
) -> None:
    splits, m, r = partial.shape
    features = y.shape[1]
    gpu = gpu_of(y)
    block_r = max(next_power_of_2(r), 16)
    tile = widen_tile(y.dtype, weight.dtype, block_r)
    row_blocks = divide_up(m, tile.rows)
    groups, each = column_groups(gpu, features, row_blocks, tile)
    launch(
        _widen_kernel,
        (row_blocks, groups),
        partial,
        inner_bias,
        thin.z,
        thin.dz,
        thin.h,
        weight,
        bias,
        scale,
        addend,
        y,
        seed if threshold else None,
        threshold,
        factor,
        m,
        features,
        splits,
        m * r,
        0 if addend is None else addend.stride(0),
        weight.stride(0),
        weight.stride(1),
        _stride_of(scale),
        each,
        R=r,
        BLOCK_R=block_r,
        BLOCK_M=tile.rows,
        BLOCK_F=tile.columns,
        STAGES=tile.stages,
        ACTIVATION=activation,
        BACKWARD=thin.dz is not None,
        num_warps=tile.warps,
        maxnreg=MAX_REGISTERS,
        enable_fp_fusion=True,
    )


def bottleneck_forward(
    x: Tensor,  # [M, K] fp32 / bf16 / fp16, unit column stride, M > 0
    residual: Tensor | None,  # [M, H], likewise
    down: Tensor,  # [R, K]
    down_bias: Tensor | None,  # [R]
    up: Tensor,  # [H, R]
    up_bias: Tensor | None,  # [H]
    scale: Tensor | None,  # [1] or [H]
    factor: float,
    activation: str,
    *,
    seed: Tensor | None,  # 0-d int64
    threshold: int,  # 0: no dropout
    dtype: torch.dtype,  # C
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """-> y [M, H] = residual + keep scale factor (act(z) up^T + up_bias) and z [M, R] in C."""
    z = x.new_empty((x.shape[0], down.shape[0]), dtype=dtype)
    y = x.new_empty((x.shape[0], up.shape[0]), dtype=out_dtype)
    down, up = _operands(down, up, x.shape[0], dtype)
    down_bias, up_bias, scale = map(_dense, (down_bias, up_bias, scale))
    with launch_device(x):
        partial = _squeeze(x, down, None, dtype, None, 0)
        _widen(
            partial, down_bias, _Thin(z), up, up_bias, scale, factor, activation, residual, y, seed,
            threshold,
        )  # fmt: skip
    return y, z


def bottleneck_backward(
    dy: Tensor,  # [M, H] fp32 / bf16 / fp16, unit column stride, M > 0
    x: Tensor,  # [M, K], likewise
    z: Tensor,  # [M, R] in C
    down: Tensor,  # [R, K]
    up: Tensor,  # [H, R]
    scale: Tensor | None,  # [1] or [H]
    factor: float,
    activation: str,
    *,
    seed: Tensor | None,  # 0-d int64
    threshold: int,
    residual_is_x: bool,
    outer_factor: float,
    outer_dtype: torch.dtype,
    bias_dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """-> what is needed of dx [M, K] in the dtype of x, d down [R, K] and the sum [R] of dz,
    outer_factor (keep dy)^T h [H, R] in ``outer_dtype``, and outer_factor times the sum [H] of
    keep dy; the sums in ``bias_dtypes``.
    """
    need_x, need_down, need_down_bias, need_outer, need_sum = needs
    m, k = x.shape
    h_features, r = up.shape
    need_dz = need_x or need_down or need_down_bias
    down_dtype = down.dtype
    down, up = _operands(down, up, m, z.dtype)
    scale = _dense(scale)
    dz = torch.empty_like(z)
    h = z
    if need_outer and activation != "identity":
        h = torch.empty_like(z)
    dx = x.new_empty((m, k if need_x else 0))
    with launch_device(x):
        if need_dz:
            partial = _squeeze(dy, up.t(), scale, z.dtype, seed, threshold)
        else:
            partial = z.new_empty((0, m, r), dtype=torch.float32)
        if need_dz or h is not z:
            _widen(
                partial, None, _Thin(z, dz, None if h is z else h), down.t(), None, None, factor,
                activation, dy if need_x and residual_is_x else None, dx, None, 0,
            )  # fmt: skip
        ddown, ddown_bias, outer, total = _weight_gradients(
            (dy, h, h_features if need_outer or need_sum else 0, outer_factor, outer_dtype),
            (x, dz, k if need_down or need_down_bias else 0, down_dtype),
            bias_dtypes,
            seed,
            threshold,
            needs[1:],
        )
    return dx if need_x else None, ddown, ddown_bias, outer, total


def _weight_gradients(
    of_up: tuple[Tensor, Tensor, int, float, torch.dtype],  # dy, h, features or 0, factor, dtype
    of_down: tuple[Tensor, Tensor, int, torch.dtype],  # x, dz, features or 0, dtype
    bias_dtypes: tuple[torch.dtype, torch.dtype],
    seed: Tensor | None,
    threshold: int,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    need_down, need_down_bias, need_outer, need_sum = needs
    (dy, h, h_features, factor, outer_dtype), (x, dz, k, down_dtype) = of_up, of_down
    if not (h_features or k):
        return None, None, None, None
    m, r = h.shape
    gpu = gpu_of(x)
    block_r = rank_block(r)
    tile = outer_tile(_wider(dy.dtype, x.dtype), block_r)
    rank_blocks = divide_up(r, block_r)
    up_programs = divide_up(h_features, tile.columns) * rank_blocks
    programs = up_programs + divide_up(k, tile.columns) * rank_blocks
    splits, each = row_splits(gpu, m, programs, tile)
    wanted = (
        (need_down, (r, k), down_dtype),
        (need_down_bias, (r,), bias_dtypes[0]),
        (need_outer, (h_features, r), outer_dtype),
        (need_sum, (h_features,), bias_dtypes[1]),
    )
    outs = [x.new_empty(shape, dtype=dtype) if need else None for need, shape, dtype in wanted]
    parts = outs
    if splits > 1:
        parts = [
            x.new_empty((splits, *shape), dtype=torch.float32) if need else None
            for need, shape, _ in wanted
        ]
    launch(
        _weight_gradients_kernel,
        (programs, splits),
        dy,
        h,
        parts[2],
        parts[3],
        x,
        dz,
        parts[0],
        parts[1],
        seed if threshold else None,
        threshold,
        factor,
        m,
        h_features,
        k,
        dy.stride(0),
        x.stride(0),
        up_programs,
        each,
        R=r,
        BLOCK_R=block_r,
        BLOCK_M=tile.rows,
        BLOCK_F=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=MAX_REGISTERS,
        enable_fp_fusion=True,
    )
    if splits > 1:
        sum_group_partials(
            [(part, out) for part, out in zip(parts, outs, strict=True) if out is not None]
        )
    return outs[0], outs[1], outs[2], outs[3]


def _wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return a if a.itemsize >= b.itemsize else b

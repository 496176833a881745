"""The four products of a LoRA branch around a base linear layer, with mask-free dropout.

Legend: M rows (tokens), K input features, N output features, R rank. x [M, K], A [R, K], B [N, R],
T = X A^T [M, R] and D = dY B [M, R] in fp32. keep is the mask of `philox`.

    lora_down           T  = s (x * keep) A^T      reads the wide x, writes the thin T
    lora_up             y0 = bias + T B^T          reads the thin T, writes the wide y0
    lora_up_backward    D  = s dY B, dB = dY^T T   one read of dY up to rank 32
    lora_down_backward  dx0 = keep * (D A), dA = D^T (x * keep)

Four kernels cover the eight products: "down" (a reduction over the features), "up" (a product over
the rank), "weight gradient" (a reduction over the rows) and the fused pair of `lora_up_backward`.
Reductions that are split write fp32 partial results, which one more launch adds in fixed order.

Precision: products accumulate in fp32 and no operand is rounded before a product, see `dot_exact`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dot_exact import dot_exact
from .launch import launch
from .lora_tables import (
    arithmetic_of,
    down_tile,
    feature_splits,
    has_tensor_cores,
    pair_tile,
    rank_block,
    row_splits,
    up_block_r,
    up_tile,
    weight_grad_tile,
)
from .partials import sum_partials, sum_two_partials
from .philox import keep_mask, load_philox_key
from .tables import MAX_REGISTERS, Tile, divide_up, gpu_of, launch_device


# Floor: read M K of x once, R K of A (stays in L2), write 4 M R; 2 M K R operations: at rank 16 in
# bf16 16 operations per byte, far below the ridge of any GPU, so the tile is chosen for bytes in
# flight: a tall block of x by the whole (padded) rank, several stages deep. With few row blocks the
# features are split as well, to fill the multiprocessors; the partial sums are then M R each.
@triton.jit(do_not_specialize=["M", "branch", "threshold", "row_offset"])
def _lora_down_kernel(
    x_ptr,  # [M, K], columns adjacent
    a_ptr,  # [R, K] by strides
    t_ptr,  # [M, R] fp32, or [splits, M, R] if PARTIAL
    scale,
    scale_ptr,  # 0-d or None
    seed_ptr,  # 0-d int64 or None
    threshold,
    branch,
    row_offset: tl.int64,
    M,
    K,
    stride_xm: tl.int64,
    stride_ar,
    stride_ak,
    k_per_split,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PARTIAL: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    rank_blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    # Programs that read the same rows of x are neighbours, so that the second read hits L2.
    pid_m = tl.program_id(0) // rank_blocks
    pid_r = tl.program_id(0) % rank_blocks
    pid_k = tl.program_id(1)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_m = rows < M
    inside_r = ranks < R
    x_rows = x_ptr + rows[:, None] * stride_xm
    a_columns = a_ptr + ranks.to(tl.int64)[None, :] * stride_ar
    if HAS_DROPOUT:
        key0, key1 = load_philox_key(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    k_begin = pid_k * k_per_split
    k_end = tl.minimum(k_begin + k_per_split, K)
    for k0 in range(k_begin, k_end, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside_k = k < K
        x = tl.load(x_rows + k[None, :], mask=inside_m[:, None] & inside_k[None, :], other=0.0)
        a = tl.load(
            a_columns + k.to(tl.int64)[:, None] * stride_ak,
            mask=inside_k[:, None] & inside_r[None, :],
            other=0.0,
        )
        if HAS_DROPOUT:
            keep = keep_mask(rows + row_offset, k0, key0, key1, branch, threshold, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        acc = dot_exact(x, a, acc, TENSOR_CORES)
    if PARTIAL:
        t_ptr += pid_k.to(tl.int64) * M * R
    else:
        if scale_ptr is not None:
            scale = scale * tl.load(scale_ptr).to(tl.float32)
        acc = acc * scale
    tl.store(
        t_ptr + rows[:, None] * R + ranks[None, :], acc, mask=inside_m[:, None] & inside_r[None, :]
    )


# Floor: write M N of y0 once, and read M N of the addend if there is one; T (4 M R) and B (N R) are
# small and stay in L2; 2 M N R operations. Mostly writes: little to keep in flight, so one tile per
# program with the whole rank in one or two steps, and enough columns per row for full 128-byte
# lines. Programs that share rows of T are neighbours.
@triton.jit(do_not_specialize=["M", "branch", "threshold", "row_offset"])
def _lora_up_kernel(
    t_ptr,  # [M, R] fp32
    b_ptr,  # [N, R] by strides
    bias_ptr,  # [N] or None
    addend_ptr,  # [M, N], columns adjacent, or None
    addend_scale_ptr,  # [N] fp32, or None
    y_ptr,  # [M, N]
    seed_ptr,  # 0-d int64 or None
    threshold,
    branch,
    row_offset: tl.int64,
    M,
    N,
    stride_addend,
    stride_bn,
    stride_br,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    column_blocks = tl.cdiv(N, BLOCK_N)
    pid_m = tl.program_id(0) // column_blocks
    pid_n = tl.program_id(0) % column_blocks
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m = rows < M
    inside_n = columns < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r0 in range(0, R, BLOCK_R):
        ranks = r0 + tl.arange(0, BLOCK_R)
        inside_r = ranks < R
        t = tl.load(
            t_ptr + rows[:, None] * R + ranks[None, :],
            mask=inside_m[:, None] & inside_r[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr
            + ranks.to(tl.int64)[:, None] * stride_br
            + columns.to(tl.int64)[None, :] * stride_bn,
            mask=inside_r[:, None] & inside_n[None, :],
            other=0.0,
        )
        acc = dot_exact(t, b, acc, TENSOR_CORES, y_ptr.dtype.element_ty != tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=inside_n, other=0.0)
        acc = acc + bias.to(tl.float32)[None, :]
    if addend_ptr is not None:
        addend = tl.load(
            addend_ptr + rows[:, None] * stride_addend + columns[None, :],
            mask=inside_m[:, None] & inside_n[None, :],
            other=0.0,
        )
        addend = addend.to(tl.float32)
        if addend_scale_ptr is not None:
            scale = tl.load(addend_scale_ptr + columns, mask=inside_n, other=0.0)
            addend = addend * scale[None, :]
        acc = acc + addend
    y = acc.to(y_ptr.dtype.element_ty)
    if HAS_DROPOUT:
        key0, key1 = load_philox_key(seed_ptr)
        keep = keep_mask(
            rows + row_offset, pid_n * BLOCK_N, key0, key1, branch, threshold, BLOCK_M, BLOCK_N
        )
        y = tl.where(keep, y, 0.0)
    tl.store(
        y_ptr + rows[:, None] * N + columns[None, :], y, mask=inside_m[:, None] & inside_n[None, :]
    )


# Floor: read M K of x once and 4 M R of D (L2), write R K; 2 M K R operations. x is the right
# operand, as it lies in memory: transposed to the left, its copy to shared memory would not be
# asynchronous before Hopper. The rows are split to fill the multiprocessors; partial sums are 4 R K
# each.
@triton.jit(do_not_specialize=["M", "branch", "threshold", "row_offset"])
def _lora_weight_grad_kernel(
    x_ptr,  # [M, K], columns adjacent
    d_ptr,  # [M, R] fp32
    out_ptr,  # [R, K] by strides, or [splits, R, K] fp32 if PARTIAL
    seed_ptr,  # 0-d int64 or None
    threshold,
    branch,
    row_offset: tl.int64,
    M,
    K,
    stride_xm: tl.int64,
    stride_or,
    stride_ok,
    rows_per_split,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PARTIAL: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    rank_blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid_k = tl.program_id(0) // rank_blocks
    pid_r = tl.program_id(0) % rank_blocks
    pid_m = tl.program_id(1)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_k = k < K
    inside_r = ranks < R
    if HAS_DROPOUT:
        key0, key1 = load_philox_key(seed_ptr)
    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    m_begin = pid_m.to(tl.int64) * rows_per_split
    m_end = tl.minimum(m_begin + rows_per_split, M)
    for m0 in range(m_begin, m_end, BLOCK_M):
        rows = m0 + tl.arange(0, BLOCK_M)
        inside_m = rows < M
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + k[None, :],
            mask=inside_m[:, None] & inside_k[None, :],
            other=0.0,
        )
        d = tl.load(
            d_ptr + rows[None, :] * R + ranks[:, None],
            mask=inside_m[None, :] & inside_r[:, None],
            other=0.0,
        )
        if HAS_DROPOUT:
            keep = keep_mask(
                rows + row_offset,
                pid_k * BLOCK_K,
                key0,
                key1,
                branch,
                threshold,
                BLOCK_M,
                BLOCK_K,
            )
            x = tl.where(keep, x, 0.0)
        acc = dot_exact(d, x, acc, TENSOR_CORES)
    if PARTIAL:
        out_ptr += pid_m.to(tl.int64) * K * R
    tl.store(
        out_ptr + ranks.to(tl.int64)[:, None] * stride_or + k.to(tl.int64)[None, :] * stride_ok,
        acc.to(out_ptr.dtype.element_ty),
        mask=inside_r[:, None] & inside_k[None, :],
    )


# Floor: read M N of dY once, T and B from L2, write the partial sums: 4 M R per block of columns
# and 4 N R per block of rows. At rank 16 in bf16 with 256 columns and 1024 rows per program these
# add 13 % and 3 % to the traffic of dY, against 100 % for a second read. 4 M N R operations. The
# long axis of each program is the rows, so that dB accumulates in registers.
@triton.jit(do_not_specialize=["M"])
def _lora_up_backward_kernel(
    dy_ptr,  # [M, N], columns adjacent
    t_ptr,  # [M, R] fp32
    b_ptr,  # [N, R]
    d_ptr,  # [column blocks, M, R] fp32
    db_ptr,  # [row blocks, N, R] fp32, or [N, R] if there is one row block
    scale,  # applied to D only if there is one column block
    scale_ptr,
    M,
    N,
    stride_dym: tl.int64,
    rows_per_program,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL_D: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    pid_m = tl.program_id(0)
    pid_n = tl.program_id(1)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    inside_n = columns < N
    inside_r = ranks < R
    of_b = columns.to(tl.int64)[:, None] * R + ranks[None, :]
    inside_b = inside_n[:, None] & inside_r[None, :]
    b = tl.load(b_ptr + of_b, mask=inside_b, other=0.0)
    if PARTIAL_D:
        d_ptr += pid_n.to(tl.int64) * M * R
        factor = 1.0
    else:
        factor = scale
        if scale_ptr is not None:
            factor = scale * tl.load(scale_ptr).to(tl.float32)
    db = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    m_begin = pid_m.to(tl.int64) * rows_per_program
    m_end = tl.minimum(m_begin + rows_per_program, M)
    for m0 in range(m_begin, m_end, BLOCK_M):
        rows = m0 + tl.arange(0, BLOCK_M)
        inside_m = rows < M
        dy = tl.load(
            dy_ptr + rows[:, None] * stride_dym + columns[None, :],
            mask=inside_m[:, None] & inside_n[None, :],
            other=0.0,
        )
        t = tl.load(
            t_ptr + rows[None, :] * R + ranks[:, None],
            mask=inside_m[None, :] & inside_r[:, None],
            other=0.0,
        )
        d = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        d = dot_exact(dy, b, d, TENSOR_CORES)
        tl.store(
            d_ptr + rows[:, None] * R + ranks[None, :],
            d * factor,
            mask=inside_m[:, None] & inside_r[None, :],
        )
        db = dot_exact(t, dy, db, TENSOR_CORES)
    db_ptr += pid_m.to(tl.int64) * N * R
    tl.store(db_ptr + of_b, tl.trans(db).to(db_ptr.dtype.element_ty), mask=inside_b)


def _down(
    x: Tensor,  # [M, K]
    a: Tensor,  # [R, K], any strides
    scale: float,
    scale_tensor: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    branch: int,
    row_offset: int,
) -> Tensor:  # [M, R] fp32
    m, k = x.shape
    r = a.shape[0]
    t = x.new_empty((m, r), dtype=torch.float32)
    if m == 0:
        return t
    gpu = gpu_of(x)
    block_r = rank_block(r)
    arithmetic = arithmetic_of(gpu, x.dtype, a.dtype)
    tile = down_tile(gpu.capability, arithmetic, block_r, threshold > 0)
    programs = divide_up(m, tile.rows) * divide_up(r, block_r)
    splits, k_per_split = feature_splits(gpu, k, programs, tile)
    out = t if splits == 1 else x.new_empty((splits, m, r), dtype=torch.float32)
    with launch_device(x):
        launch(
            _lora_down_kernel,
            (programs, splits),
            x,
            a,
            out,
            scale,
            scale_tensor,
            seed if threshold > 0 else None,
            threshold,
            branch,
            row_offset,
            m,
            k,
            x.stride(0),
            a.stride(0),
            a.stride(1),
            k_per_split,
            R=r,
            BLOCK_R=block_r,
            BLOCK_M=tile.rows,
            BLOCK_K=tile.columns,
            HAS_DROPOUT=threshold > 0,
            PARTIAL=splits > 1,
            TENSOR_CORES=has_tensor_cores(gpu),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
        if splits > 1:
            sum_partials(out, t, scale, scale_tensor)
    return t


def _up(
    t: Tensor,  # [M, R] fp32
    b: Tensor,  # [N, R], any strides
    bias: Tensor | None,
    out_dtype: torch.dtype,
    seed: Tensor | None,
    threshold: int,
    branch: int,
    row_offset: int,
    addend: Tensor | None = None,  # [M, N], unit column stride; without dropout
    addend_scale: Tensor | None = None,  # [N] fp32
    out: Tensor | None = None,  # [M, N] contiguous
) -> Tensor:  # [M, N]
    m, r = t.shape
    n = b.shape[0]
    y = t.new_empty((m, n), dtype=out_dtype) if out is None else out
    if m == 0:
        return y
    gpu = gpu_of(t)
    arithmetic = arithmetic_of(gpu, t.dtype, b.dtype, y.dtype)
    block_r = up_block_r(arithmetic, rank_block(r))
    tile = up_tile(gpu.capability, arithmetic, block_r, threshold > 0)
    with launch_device(t):
        launch(
            _lora_up_kernel,
            (divide_up(m, tile.rows) * divide_up(n, tile.columns),),
            t,
            b,
            bias,
            addend,
            addend_scale,
            y,
            seed if threshold > 0 else None,
            threshold,
            branch,
            row_offset,
            m,
            n,
            0 if addend is None else addend.stride(0),
            b.stride(0),
            b.stride(1),
            R=r,
            BLOCK_R=block_r,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            HAS_DROPOUT=threshold > 0,
            TENSOR_CORES=has_tensor_cores(gpu),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
    return y


def _weight_grad(
    x: Tensor,  # [M, K]
    d: Tensor,  # [M, R] fp32
    out: Tensor,  # [R, K], dense in either order; overwritten
    seed: Tensor | None,
    threshold: int,
    branch: int,
    row_offset: int,
) -> None:
    m, k = x.shape
    r = d.shape[1]
    if m == 0:
        out.zero_()
        return
    gpu = gpu_of(x)
    block_r = rank_block(r)
    arithmetic = arithmetic_of(gpu, x.dtype, d.dtype)
    tile = weight_grad_tile(gpu.capability, arithmetic, block_r, threshold > 0)
    programs = divide_up(k, tile.columns) * divide_up(r, block_r)
    splits, rows_per_split = row_splits(gpu, m, programs, tile)
    # The partial sums repeat the memory order of `out`, so that adding them is element by element.
    partial = out if splits == 1 else out.new_empty((splits, r * k), dtype=torch.float32)
    with launch_device(x):
        launch(
            _lora_weight_grad_kernel,
            (programs, splits),
            x,
            d,
            partial,
            seed if threshold > 0 else None,
            threshold,
            branch,
            row_offset,
            m,
            k,
            x.stride(0),
            out.stride(0),
            out.stride(1),
            rows_per_split,
            R=r,
            BLOCK_R=block_r,
            BLOCK_M=tile.rows,
            BLOCK_K=tile.columns,
            HAS_DROPOUT=threshold > 0,
            PARTIAL=splits > 1,
            TENSOR_CORES=has_tensor_cores(gpu),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
        if splits > 1:
            sum_partials(partial, out)


def _up_backward_pair(
    dy: Tensor,  # [M, N]
    t: Tensor,  # [M, R] fp32
    b: Tensor,  # [N, R]
    scale: float,
    scale_tensor: Tensor | None,
    tile: Tile,
) -> tuple[Tensor, Tensor]:  # [M, R] fp32, [N, R]
    m, n = dy.shape
    r = b.shape[1]
    d = torch.empty_like(t)
    db = torch.empty_like(b)
    gpu = gpu_of(dy)
    column_blocks = divide_up(n, tile.columns)
    # As many row blocks as fill the multiprocessors twice, of 128 to 1024 rows.
    wanted = max(2 * gpu.multiprocessors // column_blocks, 1)
    rows = min(max(divide_up(m, wanted), 128), 1024)
    rows_per_program = divide_up(rows, tile.rows) * tile.rows
    row_blocks = divide_up(m, rows_per_program)
    d_out = d if column_blocks == 1 else d.new_empty((column_blocks, m, r))
    db_out = db if row_blocks == 1 else d.new_empty((row_blocks, n, r))
    with launch_device(dy):
        launch(
            _lora_up_backward_kernel,
            (row_blocks, column_blocks),
            dy,
            t,
            b,
            d_out,
            db_out,
            scale,
            scale_tensor,
            m,
            n,
            dy.stride(0),
            rows_per_program,
            R=r,
            BLOCK_R=rank_block(r),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            PARTIAL_D=column_blocks > 1,
            TENSOR_CORES=has_tensor_cores(gpu),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
        if column_blocks > 1 and row_blocks > 1:
            sum_two_partials((d_out, d), (db_out, db), scale, scale_tensor)
        elif column_blocks > 1:
            sum_partials(d_out, d, scale, scale_tensor)
        elif row_blocks > 1:
            sum_partials(db_out, db)
    return d, db


def lora_down(
    x: Tensor,  # [M, K] fp32 / bf16 / fp16, unit column stride
    a: Tensor,  # [R, K] fp32 / bf16 / fp16
    scale: float,
    scale_tensor: Tensor | None,  # 0-d, or None for 1
    *,
    seed: Tensor | None,  # 0-d int64; unused if threshold is 0
    threshold: int,  # 0 .. 65536: a lane below it is dropped
    branch: int,
    row_offset: int = 0,
) -> Tensor:
    """-> t [M, R] fp32 = scale * scale_tensor * (x * keep) a^T."""
    return _down(x, a, float(scale), scale_tensor, seed, threshold, branch, row_offset)


def lora_up(
    t: Tensor,  # [M, R] fp32, contiguous
    b: Tensor,  # [N, R] fp32 / bf16 / fp16, contiguous
    bias: Tensor | None,  # [N], any of the dtypes
    *,
    out_dtype: torch.dtype,
    addend: Tensor | None = None,  # [M, N], unit column stride
    addend_scale: Tensor | None = None,  # [N] fp32
    out: Tensor | None = None,  # [M, N] contiguous, in `out_dtype`
) -> Tensor:
    """-> y0 [M, N] in `out_dtype` = addend addend_scale + bias + t b^T, rounded once; written into
    `out` if given.
    """
    return _up(t, b, bias, out_dtype, None, 0, 0, 0, addend, addend_scale, out)


# Floor: read and write M K of x; 10 integer operations an element for the mask.
@triton.jit(do_not_specialize=["M", "branch", "threshold", "row_offset"])
def _drop_kernel(
    x_ptr,  # [M, K], columns adjacent
    out_ptr,  # [M, K]
    seed_ptr,  # 0-d int64
    threshold,
    branch,
    row_offset: tl.int64,
    M,
    K,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_blocks = tl.cdiv(K, BLOCK_K)
    pid_m = tl.program_id(0) // column_blocks
    pid_k = tl.program_id(0) % column_blocks
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :], mask=inside, other=0.0)
    key0, key1 = load_philox_key(seed_ptr)
    keep = keep_mask(
        rows + row_offset, pid_k * BLOCK_K, key0, key1, branch, threshold, BLOCK_M, BLOCK_K
    )
    tl.store(out_ptr + rows[:, None] * K + columns[None, :], tl.where(keep, x, 0.0), mask=inside)


DROP_ROWS, DROP_COLUMNS = 8, 256  # of a program: 16 bytes a thread and row at four warps


def drop(
    x: Tensor,  # [M, K], unit column stride
    *,
    seed: Tensor,  # 0-d int64
    threshold: int,
    branch: int,
    row_offset: int = 0,
) -> Tensor:
    """-> x * keep [M, K], not scaled."""
    m, k = x.shape
    out = x.new_empty((m, k))
    if m == 0:
        return out
    with launch_device(x):
        launch(
            _drop_kernel,
            (divide_up(m, DROP_ROWS) * divide_up(k, DROP_COLUMNS),),
            x,
            out,
            seed,
            threshold,
            branch,
            row_offset,
            m,
            k,
            x.stride(0),
            BLOCK_M=DROP_ROWS,
            BLOCK_K=DROP_COLUMNS,
            num_warps=4,
        )
    return out


def lora_up_backward(
    dy: Tensor,  # [M, N] fp32 / bf16 / fp16, unit column stride
    t: Tensor | None,  # [M, R] fp32, contiguous; may be None if db is not needed
    b: Tensor,  # [N, R], contiguous
    scale: float,
    scale_tensor: Tensor | None,  # 0-d, or None for 1
    *,
    need_d: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """-> d [M, R] fp32 = scale * scale_tensor * dy b, and db [N, R] in b.dtype = dy^T t."""
    if need_d and need_db and dy.shape[0] > 0:
        gpu = gpu_of(dy)
        arithmetic = arithmetic_of(gpu, dy.dtype, b.dtype)
        tile = pair_tile(gpu.capability, arithmetic, rank_block(b.shape[1]))
        if tile is not None:
            return _up_backward_pair(dy, t, b, float(scale), scale_tensor, tile)
    d = _down(dy, b.t(), float(scale), scale_tensor, None, 0, 0, 0) if need_d else None
    db = None
    if need_db:
        db = torch.empty_like(b)
        _weight_grad(dy, t, db.t(), None, 0, 0, 0)
    return d, db


def lora_down_backward(
    d: Tensor,  # [M, R] fp32, contiguous
    a: Tensor,  # [R, K], contiguous
    x: Tensor | None,  # [M, K], unit column stride; may be None if da is not needed
    *,
    seed: Tensor | None,  # 0-d int64; unused if threshold is 0
    threshold: int,
    branch: int,
    row_offset: int = 0,
    dx_dtype: torch.dtype,
    need_dx: bool,
    need_da: bool,
    out: Tensor | None = None,  # [M, K] contiguous, in `dx_dtype`
) -> tuple[Tensor | None, Tensor | None]:
    """-> dx0 [M, K] in `dx_dtype` = keep * (d a), written into `out` if given, and da [R, K] in
    a.dtype = d^T (x * keep).
    """
    dx = None
    if need_dx:
        dx = _up(d, a.t(), None, dx_dtype, seed, threshold, branch, row_offset, out=out)
    da = None
    if need_da:
        da = torch.empty_like(a)
        _weight_grad(x, d, da, seed, threshold, branch, row_offset)
    return dx, da

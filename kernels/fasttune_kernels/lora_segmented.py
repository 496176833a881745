"""The products of a LoRA layer whose rows belong to different branches: one launch each.

Legend as in `lora_linear`. A program takes a tile: some rows of one branch, found in the tables of
`lora_segments`, so that neither the number of branches nor their ranks nor the order of the rows
changes the number of launches. Row m of branch j:

    down          T_m = s_j (x_m * keep_jm) A_j^T        d_m = s_j dY_m B_j
    up            y_m (+)= bias + s_j bias_j + T_m B_j^T  dx_m (+)= keep_jm * (d_m A_j)
    weight_grads  dA_j = sum_m d_m^T (x_m * keep_jm)      dB_j = sum_m dY_m^T T_m
    column_sums   s_j sum_m dY_m, the gradient of bias_j

Rows without a branch are in no tile: they are neither read nor written. A branch without rows gets
zeros. Sums that are split write fp32 partial results, which one more launch adds in fixed order.

A is read along its features and B along its ranks, as they lie: where a rank is no multiple of 8,
B and the rank-sized values are read element by element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dot_exact import dot_exact
from .launch import launch
from .lora_segments import (
    BASE,
    BIAS,
    BIAS_SCALE,
    BRANCH,
    COLUMNS,
    FIRST,
    FIRST_RANK,
    OFFSET,
    RANK,
    SCALE,
    SCALE_TENSOR,
    STOP,
    STREAM,
    THRESHOLD,
    TILE,
    A,
    Batch,
)
from .lora_tables import (
    SEGMENTED_UP_BLOCK_R,
    arithmetic_of,
    feature_splits,
    has_tensor_cores,
    rank_block,
    segmented_down_tile,
    segmented_weight_grad_tile,
    up_tile,
)
from .multi_tensor import ELEMENT, pointer_to
from .partials import sum_block, sum_partials
from .philox import keep_mask, load_philox_key
from .tables import MAX_REGISTERS, Tile, divide_up, gpu_of, launch_device


@triton.jit
def _scale_of(branch_ptr, COLUMN: tl.constexpr, SCALE_DTYPE: tl.constexpr):
    """One of the two scales of a branch, fp32."""
    scale = tl.load(branch_ptr + COLUMN).to(tl.int32).to(tl.float32, bitcast=True)
    if SCALE_DTYPE is not None:
        address = tl.load(branch_ptr + SCALE_TENSOR)
        factor = tl.load(pointer_to(address, SCALE_DTYPE, False), mask=address != 0, other=1.0)
        scale = scale * factor.to(tl.float32)
    return scale


@triton.jit
def _rank_of(branch_ptr, EIGHTS: tl.constexpr):
    rank = tl.load(branch_ptr + RANK).to(tl.int32)
    if EIGHTS:
        rank = tl.multiple_of(rank, 8)
    return rank


@triton.jit
def _thin_of(thin_ptr, branch_ptr, EIGHTS: tl.constexpr):
    """The rank-sized values of place 0, were it the branch's."""
    offset = tl.load(branch_ptr + OFFSET)
    if EIGHTS:
        offset = tl.multiple_of(offset, 8)
    return thin_ptr + offset


@triton.jit
def _kept(x, counted, start, branch_ptr, seed_ptr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """x [BLOCK_M, BLOCK_K] with the elements dropped that the branch drops."""
    key0, key1 = load_philox_key(seed_ptr)
    stream, threshold = tl.load(branch_ptr + STREAM), tl.load(branch_ptr + THRESHOLD)
    keep = keep_mask(counted, start, key0, key1, stream, threshold, BLOCK_M, BLOCK_K)
    return tl.where(keep, x, 0.0)


# Floor: read P K of x once (P the rows that have a branch), 8 P of their numbers, A (in L2), write
# 4 P R; 2 P K R operations. As `_lora_down_kernel`: tall blocks of x by the whole rank, the
# features split where there are few tiles. The padding of a tile is the price of one launch: in
# the last tile of a branch the rows past its own read nothing, ranks past its own compute.
@triton.jit(do_not_specialize=["stride_split"])
def _lora_segmented_down_kernel(
    x_ptr,  # [M, K], columns adjacent
    rows_ptr,  # [P] int64
    tiles_ptr,  # [tiles, TILE] int32
    branches_ptr,  # [J, COLUMNS] int64
    t_ptr,  # [P, R] by branch, fp32, or one for each split of K
    seed_ptr,  # 0-d int64 or None
    K,
    stride_xm: tl.int64,
    stride_split: tl.int64,
    k_per_split,
    FACTOR: tl.constexpr,  # the column of A [R, K], or of B [K, R] where x is dY
    FACTOR_DTYPE: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    EIGHTS: tl.constexpr,
    BY_PLACE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(0) * TILE
    pid_k = tl.program_id(1)
    branch_ptr = branches_ptr + tl.load(tile_ptr + BRANCH) * COLUMNS
    R = _rank_of(branch_ptr, EIGHTS)
    places = tl.load(tile_ptr + FIRST) + tl.arange(0, BLOCK_M)
    inside_m = places < tl.load(tile_ptr + STOP)
    ranks = tl.multiple_of(tl.load(tile_ptr + FIRST_RANK), BLOCK_R) + tl.arange(0, BLOCK_R)
    inside_r = ranks < R
    rows = tl.load(rows_ptr + places, mask=inside_m, other=0)
    counted = places.to(tl.int64) if BY_PLACE else rows
    x_rows = x_ptr + rows[:, None] * stride_xm
    factor_ptr = pointer_to(tl.load(branch_ptr + FACTOR), FACTOR_DTYPE, ALIGNED)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    k_begin = pid_k * k_per_split
    k_end = tl.minimum(k_begin + k_per_split, K)
    for k0 in range(k_begin, k_end, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside_k = k < K
        x = tl.load(x_rows + k[None, :], mask=inside_m[:, None] & inside_k[None, :], other=0.0)
        if FACTOR == A:
            at = ranks.to(tl.int64)[None, :] * K + k[:, None]
        else:
            at = k.to(tl.int64)[:, None] * R + ranks[None, :]
        a = tl.load(factor_ptr + at, mask=inside_k[:, None] & inside_r[None, :], other=0.0)
        if HAS_DROPOUT:
            x = _kept(x, counted, k0, branch_ptr, seed_ptr, BLOCK_M, BLOCK_K)
        acc = dot_exact(x, a, acc, TENSOR_CORES)
    thin = _thin_of(t_ptr + pid_k * stride_split, branch_ptr, EIGHTS)
    tl.store(
        thin + places.to(tl.int64)[:, None] * R + ranks[None, :],
        acc * _scale_of(branch_ptr, SCALE, SCALE_DTYPE),
        mask=inside_m[:, None] & inside_r[None, :],
    )


# Floor: write P N of y once, and read it first if the product is added to it; T (4 P R) and B stay
# in L2; 2 P N R operations. As `_lora_up_kernel`.
@triton.jit
def _lora_segmented_up_kernel(
    t_ptr,  # [P, R] by branch, fp32
    rows_ptr,  # [P] int64
    tiles_ptr,  # [tiles, TILE] int32
    branches_ptr,  # [J, COLUMNS] int64
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N]
    seed_ptr,  # 0-d int64 or None
    N,
    FACTOR: tl.constexpr,  # the column of B [N, R], or of A [R, N] where y is dx
    FACTOR_DTYPE: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    BIAS_DTYPE: tl.constexpr,  # of the branches' biases, or None
    ALIGNED: tl.constexpr,
    EIGHTS: tl.constexpr,
    BY_PLACE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    column_blocks = tl.cdiv(N, BLOCK_N)
    tile_ptr = tiles_ptr + tl.program_id(0) // column_blocks * TILE
    start = tl.program_id(0) % column_blocks * BLOCK_N
    branch_ptr = branches_ptr + tl.load(tile_ptr + BRANCH) * COLUMNS
    R = _rank_of(branch_ptr, EIGHTS)
    places = tl.load(tile_ptr + FIRST) + tl.arange(0, BLOCK_M)
    inside_m = places < tl.load(tile_ptr + STOP)
    rows = tl.load(rows_ptr + places, mask=inside_m, other=0)
    columns = start + tl.arange(0, BLOCK_N)
    inside_n = columns < N
    thin = _thin_of(t_ptr, branch_ptr, EIGHTS) + places.to(tl.int64)[:, None] * R
    factor_ptr = pointer_to(tl.load(branch_ptr + FACTOR), FACTOR_DTYPE, ALIGNED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r0 in range(0, R, BLOCK_R):
        ranks = r0 + tl.arange(0, BLOCK_R)
        inside_r = ranks < R
        t = tl.load(thin + ranks[None, :], mask=inside_m[:, None] & inside_r[None, :], other=0.0)
        if FACTOR == A:
            at = ranks.to(tl.int64)[:, None] * N + columns[None, :]
        else:
            at = columns.to(tl.int64)[None, :] * R + ranks[:, None]
        b = tl.load(factor_ptr + at, mask=inside_r[:, None] & inside_n[None, :], other=0.0)
        acc = dot_exact(t, b, acc, TENSOR_CORES, y_ptr.dtype.element_ty != tl.float32)
    if HAS_DROPOUT:
        counted = places.to(tl.int64) if BY_PLACE else rows
        acc = _kept(acc, counted, start, branch_ptr, seed_ptr, BLOCK_M, BLOCK_N)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=inside_n, other=0.0)
        acc = acc + bias.to(tl.float32)[None, :]
    if BIAS_DTYPE is not None:
        address = tl.load(branch_ptr + BIAS)
        own_ptr = pointer_to(address, BIAS_DTYPE, False)
        own = tl.load(own_ptr + columns, mask=columns < tl.where(address != 0, N, 0), other=0.0)
        scale = _scale_of(branch_ptr, BIAS_SCALE, SCALE_DTYPE)
        acc = acc + (own.to(tl.float32) * scale)[None, :]
    y_tile = y_ptr + rows[:, None] * N + columns[None, :]
    inside = inside_m[:, None] & inside_n[None, :]
    if ADD:
        acc += tl.load(y_tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=inside)


# Floor: read P K of x once and 4 P R of D (L2), write R K a branch; 2 P K R operations. As
# `_lora_weight_grad_kernel`: a tile is a stretch of a branch's rows, walked in order; the partial
# sums are 4 R K for each, of at least 256 rows but for the last one of a branch.
@triton.jit
def _lora_segmented_weight_grad_kernel(
    x_ptr,  # [M, K], columns adjacent
    rows_ptr,  # [P] int64
    tiles_ptr,  # [tiles, TILE] int32
    branches_ptr,  # [J, COLUMNS] int64
    d_ptr,  # [P, R] by branch, fp32, or None for ones of rank 1
    out_ptr,  # [R, K] for each tile, or [K, R]
    seed_ptr,  # 0-d int64 or None
    K,
    stride_xm: tl.int64,
    FACTOR: tl.constexpr,  # A: results are [R, K]; B: they are [K, R]
    EIGHTS: tl.constexpr,
    BY_PLACE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(0) * TILE
    start = tl.program_id(1) * BLOCK_K
    branch_ptr = branches_ptr + tl.load(tile_ptr + BRANCH) * COLUMNS
    R = 1 if d_ptr is None else _rank_of(branch_ptr, EIGHTS)
    ranks = tl.multiple_of(tl.load(tile_ptr + FIRST_RANK), BLOCK_R) + tl.arange(0, BLOCK_R)
    inside_r = ranks < R
    k = start + tl.arange(0, BLOCK_K)
    inside_k = k < K
    stop = tl.load(tile_ptr + STOP)
    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for first in range(tl.load(tile_ptr + FIRST), stop, BLOCK_M):
        places = first + tl.arange(0, BLOCK_M)
        inside_m = places < stop
        rows = tl.load(rows_ptr + places, mask=inside_m, other=0)
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + k[None, :],
            mask=inside_m[:, None] & inside_k[None, :],
            other=0.0,
        )
        inside = inside_m[None, :] & inside_r[:, None]
        if d_ptr is None:
            d = tl.where(inside, 1.0, 0.0)
        else:
            thin = _thin_of(d_ptr, branch_ptr, EIGHTS)
            at = places.to(tl.int64)[None, :] * R + ranks[:, None]
            d = tl.load(thin + at, mask=inside, other=0.0)
        if HAS_DROPOUT:
            counted = places.to(tl.int64) if BY_PLACE else rows
            x = _kept(x, counted, start, branch_ptr, seed_ptr, BLOCK_M, BLOCK_K)
        acc = dot_exact(d, x, acc, TENSOR_CORES)
    out_ptr += tl.load(tile_ptr + BASE).to(tl.int64) * K
    if FACTOR == A:
        at = ranks.to(tl.int64)[:, None] * K + k[None, :]
    else:
        at = k.to(tl.int64)[None, :] * R + ranks[:, None]
    tl.store(
        out_ptr + at,
        acc.to(out_ptr.dtype.element_ty),
        mask=inside_r[:, None] & inside_k[None, :],
    )


# Floor: read the partial results, write R K a branch. As `_sum_partials_kernel`, a branch a line
# of the grid.
@triton.jit
def _lora_segmented_sum_kernel(
    partial_ptr,  # [R, features] for each tile, fp32
    out_ptr,  # [R, features] for each branch
    sums_ptr,  # [branches, 5] int32: of `Tiles`, and the index of the branch
    branches_ptr,  # [J, COLUMNS] int64
    features,
    SCALED: tl.constexpr,  # by the scale of the branch's bias
    SCALE_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sums_ptr += tl.program_id(1) * 5
    base = tl.load(sums_ptr).to(tl.int64) * features
    numel = tl.load(sums_ptr + 2).to(tl.int64) * features
    before = tl.load(sums_ptr + 3).to(tl.int64) * features
    scale = 1.0
    if SCALED:
        branch_ptr = branches_ptr + tl.load(sums_ptr + 4) * COLUMNS
        scale = _scale_of(branch_ptr, BIAS_SCALE, SCALE_DTYPE)
    count = tl.load(sums_ptr + 1)
    block = tl.program_id(0)
    sum_block(partial_ptr + base, out_ptr + before, scale, None, numel, count, block, BLOCK)


_SUM_BLOCK = 512  # 16 bytes a thread


def _options(tile: Tile) -> dict[str, Any]:
    return {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": MAX_REGISTERS,
        "enable_fp_fusion": True,
    }


def _factor(batch: Batch, factor: tl.constexpr) -> tuple[torch.dtype, dict[str, Any]]:
    """The dtype of A or of B, and what the kernels know about it."""
    dtype = batch.a_dtype if factor is A else batch.b_dtype
    facts = {"FACTOR": factor.value, "FACTOR_DTYPE": ELEMENT[dtype], "ALIGNED": batch.aligned}
    return dtype, {**facts, "SCALE_DTYPE": batch.scale}


def down(
    batch: Batch,
    x: Tensor,  # [M, K] fp32 / bf16 / fp16, unit column stride; or dY [M, N]
    factor: tl.constexpr,  # A; or B
    seed: Tensor | None = None,  # 0-d int64, None without dropout
) -> Tensor:
    """-> the buffer of t (of d), fp32: [P_j, R_j] = s_j (x_m * keep_jm) A_j^T of every branch."""
    k = x.shape[1]
    gpu, block_r = gpu_of(x), rank_block(max(batch.ranks))
    dtype, facts = _factor(batch, factor)
    tile = segmented_down_tile(
        gpu.capability, arithmetic_of(gpu, x.dtype, dtype), block_r, seed is not None
    )
    table = batch.tiles(tile.rows, block_r).table
    splits, k_per_split = feature_splits(gpu, k, len(table), tile)
    total = batch.offsets[-1]
    t = x.new_empty(total, dtype=torch.float32)
    out = t if splits == 1 else x.new_empty((splits, total), dtype=torch.float32)
    with launch_device(x):
        launch(
            _lora_segmented_down_kernel,
            (len(table), splits),
            x,
            batch.rows,
            table,
            batch.branches,
            out,
            seed,
            k,
            x.stride(0),
            total,
            k_per_split,
            **facts,
            EIGHTS=batch.eights,
            BY_PLACE=batch.by_place,
            BLOCK_R=block_r,
            BLOCK_M=tile.rows,
            BLOCK_K=tile.columns,
            HAS_DROPOUT=seed is not None,
            TENSOR_CORES=has_tensor_cores(gpu),
            **_options(tile),
        )
        if splits > 1:
            sum_partials(out, t)
    return t


def up(
    batch: Batch,
    t: Tensor,  # the buffer of t; or of d
    y: Tensor,  # [M, N] contiguous; or dx [M, K]
    factor: tl.constexpr,  # B; or A
    *,
    add: bool,
    bias: Tensor | None = None,  # [N]
    lora_bias: bool = False,
    seed: Tensor | None = None,  # 0-d int64, None without dropout
) -> None:
    """y_m = keep_jm * (t_m B_j^T) + bias + s_j bias_j of every row that has a branch, the last only
    with ``lora_bias``; plus what y holds, with ``add``. Rounded once.
    """
    n = y.shape[1]
    gpu = gpu_of(y)
    dtype, facts = _factor(batch, factor)
    arithmetic = arithmetic_of(gpu, t.dtype, dtype, y.dtype)
    tile = up_tile(gpu.capability, arithmetic, SEGMENTED_UP_BLOCK_R, seed is not None)
    table = batch.tiles(tile.rows, max(batch.ranks)).table
    with launch_device(y):
        launch(
            _lora_segmented_up_kernel,
            (len(table) * divide_up(n, tile.columns),),
            t,
            batch.rows,
            table,
            batch.branches,
            bias,
            y,
            seed,
            n,
            **facts,
            BIAS_DTYPE=batch.bias if lora_bias else None,
            EIGHTS=batch.eights,
            BY_PLACE=batch.by_place,
            ADD=add,
            BLOCK_R=SEGMENTED_UP_BLOCK_R,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            HAS_DROPOUT=seed is not None,
            TENSOR_CORES=has_tensor_cores(gpu),
            **_options(tile),
        )


def weight_grads(
    batch: Batch,
    x: Tensor,  # [M, K] unit column stride; or dY [M, N]
    d: Tensor,  # the buffer of d; or of t
    members: Sequence[int],  # the branches that need it, at least one
    factor: tl.constexpr,  # A; or B
    seed: Tensor | None = None,  # 0-d int64, None without dropout
) -> list[Tensor]:
    """-> dA_j [R, K] (dB_j [N, R]) of the members in the dtype of A (B), views of one buffer."""
    dtype = batch.a_dtype if factor is A else batch.b_dtype
    k, ranks = x.shape[1], [batch.ranks[j] for j in members]
    out = _reduced(batch, x, d, members, factor, dtype, seed)
    shapes = [(rank, k) if factor is A else (k, rank) for rank in ranks]
    parts = out.split([rank * k for rank in ranks])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def column_sums(
    batch: Batch,
    dy: Tensor,  # [M, N] unit column stride
    members: Sequence[int],  # the branches that need it, at least one
) -> list[Tensor]:
    """-> s_j sum_m dy_m [N] fp32 over the rows of every member, views of one buffer."""
    out = _reduced(batch, dy, None, members, A, torch.float32, None)
    return list(out.view(len(members), -1).unbind())


def _reduced(
    batch: Batch,
    x: Tensor,
    d: Tensor | None,
    members: Sequence[int],
    factor: tl.constexpr,
    dtype: torch.dtype,
    seed: Tensor | None,
) -> Tensor:
    """Sums over the rows of each member, one after the other; None for d: of ones, scaled."""
    k = x.shape[1]
    gpu = gpu_of(x)
    block_r = 16 if d is None else rank_block(max(batch.ranks))
    arithmetic = arithmetic_of(gpu, x.dtype, torch.float32)
    tile = segmented_weight_grad_tile(gpu.capability, arithmetic, block_r, seed is not None)
    # Fill the multiprocessors twice, with at least 256 rows per program, as for one branch.
    k_blocks = divide_up(k, tile.columns)
    splits = divide_up(2 * gpu.multiprocessors, k_blocks)
    rows = max(divide_up(batch.places.firsts[-1], splits), 256)
    rows = divide_up(rows, tile.rows) * tile.rows
    tiles = batch.tiles(rows, block_r, members, rank=0 if d is not None else 1)
    ranks = len(members) if d is None else sum(batch.ranks[j] for j in members)
    out = x.new_empty(ranks * k, dtype=dtype)
    finished = tiles.single and d is not None
    partial = out if finished else x.new_empty(tiles.results * k, dtype=torch.float32)
    with launch_device(x):
        if len(tiles.table):
            launch(
                _lora_segmented_weight_grad_kernel,
                (len(tiles.table), k_blocks),
                x,
                batch.rows,
                tiles.table,
                batch.branches,
                d,
                partial,
                seed,
                k,
                x.stride(0),
                FACTOR=factor.value,
                EIGHTS=batch.eights,
                BY_PLACE=batch.by_place,
                BLOCK_R=block_r,
                BLOCK_M=tile.rows,
                BLOCK_K=tile.columns,
                HAS_DROPOUT=seed is not None,
                TENSOR_CORES=has_tensor_cores(gpu),
                **_options(tile),
            )
        if not finished:
            widest = 1 if d is None else max(batch.ranks[j] for j in members)
            launch(
                _lora_segmented_sum_kernel,
                (divide_up(widest * k, _SUM_BLOCK), len(members)),
                partial,
                out,
                tiles.sums,
                batch.branches,
                k,
                SCALED=d is None,
                SCALE_DTYPE=batch.scale,
                BLOCK=_SUM_BLOCK,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return out

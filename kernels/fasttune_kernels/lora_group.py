"""The four products of a LoRA branch for all branches of a group at once: the wide x is read once.

A group is projections of one input: q, k and v, or gate and up. Legend and precision as in
`lora_linear`; j numbers the branches.

    lora_down_group           T_j = s_j (x * keep_j) A_j^T           one read of x
    lora_up_group             y0_i = bias_i + T_i B_i^T              one launch
    lora_up_backward_group    D_j = s_j dY_j B_j, dB_j = dY_j^T T_j  one launch, one read of dY
    lora_down_backward_group  dx0 = sum_j keep_j * (D_j A_j)         one write of dx0
                              dA_j = D_j^T (x * keep_j)              one read of x

Each kernel takes a tuple of branches, and its body is repeated for each of them at compile time
(by hand in a loop over tiles, because Triton before 3.9 carries no tuples through one). More
branches than a program has registers for are taken in packs: n branches of rank 16 read x n / 3
times, rounded up, and the dx0 of packs are added. Each function returns None where no two branches
fit one kernel; `lora_linear` then takes them one by one, as a branch that is left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lora_linear
from .dot_exact import dot_exact
from .launch import launch
from .lora_tables import (
    GROUP_BRANCHES,
    GROUP_RANKS,
    arithmetic_of,
    feature_splits,
    group_down_tile,
    group_input_gradient_tile,
    group_pair_tile,
    group_weight_grad_tile,
    has_tensor_cores,
    rank_block,
    row_splits,
    up_tile,
)
from .partials import sum_group_partials, sum_partials
from .philox import keep_mask, load_philox_key
from .tables import MAX_REGISTERS, divide_up, gpu_of, launch_device


class Draw(TypedDict):
    """Where the random bits of a branch's dropout come from: as the keywords of `lora_linear`."""

    seed: Tensor | None  # 0-d int64; unused without dropout
    threshold: int  # 0 .. 65536: a lane below it is dropped
    branch: int


@triton.jit
def _scaled(scale, scale_ptr):
    if scale_ptr is not None:
        scale = scale * tl.load(scale_ptr).to(tl.float32)
    return scale


@triton.jit
def _drop(
    x, rows, start, seed_ptr, stream, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """x [BLOCK_M, BLOCK_K] with the elements dropped that the branch drops."""
    key0, key1 = load_philox_key(seed_ptr)
    stream = tl.full((), stream, tl.uint32)
    keep = keep_mask(rows, start, key0, key1, stream, threshold, BLOCK_M, BLOCK_K)
    return tl.where(keep, x, 0.0)


@triton.jit
def _down_step(
    branch, acc, x, rows, k0, K, threshold,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, TENSOR_CORES: tl.constexpr,
):  # fmt: skip
    a_ptr, _, _, _, seed_ptr, stream, R = branch
    k = k0 + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    a = tl.load(
        a_ptr + ranks.to(tl.int64)[None, :] * K + k[:, None],
        mask=(k < K)[:, None] & (ranks < R)[None, :],
        other=0.0,
    )
    if HAS_DROPOUT:
        x = _drop(x, rows, k0, seed_ptr, stream, threshold, BLOCK_M, BLOCK_K)
    return dot_exact(x, a, acc, TENSOR_CORES)


@triton.jit
def _store_down(branch, acc, split, rows, M, BLOCK_R: tl.constexpr):
    _, t_ptr, scale, scale_ptr, _, _, R = branch
    ranks = tl.arange(0, BLOCK_R)
    tl.store(
        t_ptr + split + rows[:, None] * R + ranks[None, :],
        acc * _scaled(scale, scale_ptr),
        mask=(rows < M)[:, None] & (ranks < R)[None, :],
    )


# Floor: read M K of x once for the whole group, write 4 M R a branch; 2 M K R operations a branch.
@triton.jit(do_not_specialize=["M", "threshold", "row_offset"])
def _lora_down_group_kernel(
    x_ptr,  # [M, K], columns adjacent
    branches,  # a [R, K], t [M, R] fp32, scale, 0-d scale or None, 0-d seed or None, stream, R
    threshold,
    row_offset: tl.int64,
    M,
    K,
    stride_xm: tl.int64,
    stride_split: tl.int64,  # elements of t between two splits of K
    k_per_split,
    BRANCHES: tl.constexpr,  # how many: Triton before 3.9 has no len of a tuple with None
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    pid_k = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_m = rows < M
    x_rows = x_ptr + rows[:, None] * stride_xm
    k_begin = pid_k * k_per_split
    k_end = tl.minimum(k_begin + k_per_split, K)
    # One accumulator for each of up to GROUP_BRANCHES branches; those not there cost nothing.
    acc0 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    acc1 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    acc2 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(k_begin, k_end, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k[None, :], mask=inside_m[:, None] & (k < K)[None, :], other=0.0)
        acc0 = _down_step(
            branches[0], acc0, x, rows + row_offset, k0, K, threshold,
            BLOCK_R, BLOCK_M, BLOCK_K, HAS_DROPOUT, TENSOR_CORES,
        )  # fmt: skip
        acc1 = _down_step(
            branches[1], acc1, x, rows + row_offset, k0, K, threshold,
            BLOCK_R, BLOCK_M, BLOCK_K, HAS_DROPOUT, TENSOR_CORES,
        )  # fmt: skip
        if BRANCHES > 2:
            acc2 = _down_step(
                branches[2], acc2, x, rows + row_offset, k0, K, threshold,
                BLOCK_R, BLOCK_M, BLOCK_K, HAS_DROPOUT, TENSOR_CORES,
            )  # fmt: skip
    split = pid_k * stride_split
    _store_down(branches[0], acc0, split, rows, M, BLOCK_R)
    _store_down(branches[1], acc1, split, rows, M, BLOCK_R)
    if BRANCHES > 2:
        _store_down(branches[2], acc2, split, rows, M, BLOCK_R)


# Floor: write M N of every y0; T and B are small. One launch instead of one a projection.
@triton.jit(do_not_specialize=["M", "column_blocks"])
def _lora_up_group_kernel(
    branches,  # t [M, R] fp32, b [N, R], bias [N] or None, y [M, N], R, N
    M,
    column_blocks,  # of all branches
    BRANCHES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    pid_m = tl.program_id(0) // column_blocks
    pid_n = tl.program_id(0) % column_blocks
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    inside_m = rows < M
    first = 0
    for j in tl.static_range(BRANCHES):
        t_ptr, b_ptr, bias_ptr, y_ptr, R, N = branches[j]
        last = first + tl.cdiv(N, BLOCK_N)
        if (pid_n >= first) & (pid_n < last):
            columns = (pid_n - first) * BLOCK_N + tl.arange(0, BLOCK_N)
            inside_n = columns < N
            inside_r = ranks < R
            t = tl.load(
                t_ptr + rows[:, None] * R + ranks[None, :],
                mask=inside_m[:, None] & inside_r[None, :],
                other=0.0,
            )
            b = tl.load(
                b_ptr + columns.to(tl.int64)[None, :] * R + ranks[:, None],
                mask=inside_r[:, None] & inside_n[None, :],
                other=0.0,
            )
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            acc = dot_exact(t, b, acc, TENSOR_CORES, y_ptr.dtype.element_ty != tl.float32)
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + columns, mask=inside_n, other=0.0)
                acc = acc + bias.to(tl.float32)[None, :]
            tl.store(
                y_ptr + rows[:, None] * N + columns[None, :],
                acc.to(y_ptr.dtype.element_ty),
                mask=inside_m[:, None] & inside_n[None, :],
            )
        first = last


# Floor: read M N of every dY once; partial sums as in `lora_linear`.
@triton.jit(do_not_specialize=["M"])
def _lora_up_backward_group_kernel(
    branches,  # dy [M, N], t [M, R] fp32, b [N, R], d [column blocks, M, R] fp32,
    # db [row blocks, N, R] fp32, scale, 0-d scale or None, R, N, stride of dy's rows
    M,
    rows_per_program,
    BRANCHES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    pid_m = tl.program_id(0)
    pid_n = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    m_begin = pid_m.to(tl.int64) * rows_per_program
    m_end = tl.minimum(m_begin + rows_per_program, M)
    first = 0
    for j in tl.static_range(BRANCHES):
        dy_ptr, t_ptr, b_ptr, d_ptr, db_ptr, scale, scale_ptr, R, N, stride_dym = branches[j]
        last = first + tl.cdiv(N, BLOCK_N)
        if (pid_n >= first) & (pid_n < last):
            block = pid_n - first
            columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
            inside_n = columns < N
            inside_r = ranks < R
            of_b = columns.to(tl.int64)[:, None] * R + ranks[None, :]
            inside_b = inside_n[:, None] & inside_r[None, :]
            b = tl.load(b_ptr + of_b, mask=inside_b, other=0.0)
            d_block = d_ptr + block.to(tl.int64) * M * R
            factor = _scaled(scale, scale_ptr)
            db = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
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
                    d_block + rows[:, None] * R + ranks[None, :],
                    d * factor,
                    mask=inside_m[:, None] & inside_r[None, :],
                )
                db = dot_exact(t, dy, db, TENSOR_CORES)
            db_block = db_ptr + pid_m.to(tl.int64) * N * R
            tl.store(db_block + of_b, tl.trans(db), mask=inside_b)
        first = last


@triton.jit
def _weight_grad_step(
    branch, acc, x, rows, start, M, row_offset, threshold,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, TENSOR_CORES: tl.constexpr,
):  # fmt: skip
    d_ptr, _, seed_ptr, stream, R = branch
    ranks = tl.arange(0, BLOCK_R)
    d = tl.load(
        d_ptr + rows[None, :] * R + ranks[:, None],
        mask=(rows < M)[None, :] & (ranks < R)[:, None],
        other=0.0,
    )
    if HAS_DROPOUT:
        x = _drop(x, rows + row_offset, start, seed_ptr, stream, threshold, BLOCK_M, BLOCK_K)
    return dot_exact(d, x, acc, TENSOR_CORES)


@triton.jit
def _store_weight_grad(branch, acc, split, k, K, BLOCK_R: tl.constexpr):
    _, out_ptr, _, _, R = branch
    ranks = tl.arange(0, BLOCK_R)
    tl.store(
        out_ptr + split * R + ranks.to(tl.int64)[:, None] * K + k[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(ranks < R)[:, None] & (k < K)[None, :],
    )


# Floor: read M K of x once for the whole group; partial sums of 4 R K a branch and split.
@triton.jit(do_not_specialize=["M", "threshold", "row_offset"])
def _lora_weight_grad_group_kernel(
    x_ptr,  # [M, K], columns adjacent
    branches,  # d [M, R] fp32, out [splits, R, K] fp32, 0-d seed or None, stream, R
    threshold,
    row_offset: tl.int64,
    M,
    K,
    stride_xm: tl.int64,
    rows_per_split,
    BRANCHES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    pid_k = tl.program_id(0)
    pid_m = tl.program_id(1)
    start = pid_k * BLOCK_K
    k = start + tl.arange(0, BLOCK_K)
    inside_k = k < K
    m_begin = pid_m.to(tl.int64) * rows_per_split
    m_end = tl.minimum(m_begin + rows_per_split, M)
    acc0 = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)  # as in `_lora_down_group_kernel`
    acc1 = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    acc2 = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for m0 in range(m_begin, m_end, BLOCK_M):
        rows = m0 + tl.arange(0, BLOCK_M)
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + k[None, :],
            mask=(rows < M)[:, None] & inside_k[None, :],
            other=0.0,
        )
        acc0 = _weight_grad_step(
            branches[0], acc0, x, rows, start, M, row_offset, threshold,
            BLOCK_R, BLOCK_M, BLOCK_K, HAS_DROPOUT, TENSOR_CORES,
        )  # fmt: skip
        acc1 = _weight_grad_step(
            branches[1], acc1, x, rows, start, M, row_offset, threshold,
            BLOCK_R, BLOCK_M, BLOCK_K, HAS_DROPOUT, TENSOR_CORES,
        )  # fmt: skip
        if BRANCHES > 2:
            acc2 = _weight_grad_step(
                branches[2], acc2, x, rows, start, M, row_offset, threshold,
                BLOCK_R, BLOCK_M, BLOCK_K, HAS_DROPOUT, TENSOR_CORES,
            )  # fmt: skip
    split = pid_m.to(tl.int64) * K
    _store_weight_grad(branches[0], acc0, split, k, K, BLOCK_R)
    _store_weight_grad(branches[1], acc1, split, k, K, BLOCK_R)
    if BRANCHES > 2:
        _store_weight_grad(branches[2], acc2, split, k, K, BLOCK_R)


# Floor: write M K of dx0 once; D and A are small. The sum over the branches stays in registers and
# rounds once.
@triton.jit(do_not_specialize=["M", "threshold", "row_offset"])
def _lora_input_gradient_group_kernel(
    branches,  # d [M, R] fp32, a [R, K], 0-d seed or None, stream, R
    dx_ptr,  # [M, K]
    threshold,
    row_offset: tl.int64,
    M,
    K,
    BRANCHES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    column_blocks = tl.cdiv(K, BLOCK_K)
    pid_m = tl.program_id(0) // column_blocks
    start = tl.program_id(0) % column_blocks * BLOCK_K
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = start + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    inside_m = rows < M
    inside_k = k < K
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for j in tl.static_range(BRANCHES):
        d_ptr, a_ptr, seed_ptr, stream, R = branches[j]
        inside_r = ranks < R
        d = tl.load(
            d_ptr + rows[:, None] * R + ranks[None, :],
            mask=inside_m[:, None] & inside_r[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + ranks.to(tl.int64)[:, None] * K + k[None, :],
            mask=inside_r[:, None] & inside_k[None, :],
            other=0.0,
        )
        if HAS_DROPOUT:
            part = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
            part = dot_exact(d, a, part, TENSOR_CORES, dx_ptr.dtype.element_ty != tl.float32)
            total += _drop(
                part, rows + row_offset, start, seed_ptr, stream, threshold, BLOCK_M, BLOCK_K
            )
        else:
            total = dot_exact(d, a, total, TENSOR_CORES, dx_ptr.dtype.element_ty != tl.float32)
    tl.store(
        dx_ptr + rows[:, None] * K + k[None, :],
        total.to(dx_ptr.dtype.element_ty),
        mask=inside_m[:, None] & inside_k[None, :],
    )


def _block_r(ranks: Sequence[int]) -> int:
    return rank_block(max(ranks))


def _packs(
    factors: Sequence[Tensor],
    ranks: Sequence[int],
    rows: int,
    draws: Sequence[Draw] = (),
) -> tuple[tuple[int, ...], ...]:
    """Branches with these factors [R, K] or [N, R], split into those that go through one kernel.

    Branches of one kernel share the dtype, the dropout and a block of ranks. Packs are of even
    sizes: a kernel is compiled for each size.
    """
    kinds = []
    for j, factor in enumerate(factors):
        fits = rows > 0 and factor.is_contiguous() and 0 < ranks[j] <= GROUP_RANKS // 2
        kinds.append((factor.dtype, draws[j]["threshold"] if draws else 0) if fits else None)
    return _packs_of(tuple(kinds), tuple(ranks))


@functools.lru_cache(maxsize=256)
def _packs_of(kinds: tuple[object, ...], ranks: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """``kinds``: of each branch what those of one kernel share, None if it goes alone."""
    alike: dict[object, list[int]] = {}
    for j, kind in enumerate(kinds):
        alike.setdefault(j if kind is None else kind, []).append(j)
    packs = []
    for members in alike.values():
        block_r = _block_r([ranks[j] for j in members])
        limit = min(GROUP_BRANCHES, max(GROUP_RANKS // block_r, 1))
        count, size = divide_up(len(members), limit), len(members)
        packs += [tuple(members[i * size // count : (i + 1) * size // count]) for i in range(count)]
    return tuple(packs)


def _alone(packs: Sequence[Sequence[int]]) -> bool:
    return all(len(pack) == 1 for pack in packs)


def _of(pack: Sequence[int], *lists: Sequence[Any]) -> list[list[Any]]:
    """The items of a pack's branches."""
    return [[items[j] for j in pack] for items in lists]


def _in_order(packs: Sequence[Sequence[int]], results: Sequence[Sequence[Any]]) -> list[Any]:
    """The results of all packs, branch by branch."""
    if len(packs) == 1:
        return list(results[0])
    found = {}
    for pack, items in zip(packs, results, strict=True):
        found.update(zip(pack, items, strict=True))
    return [found[j] for j in range(len(found))]


def lora_down_group(
    x: Tensor,  # [M, K], unit column stride
    a: Sequence[Tensor],  # [R, K]
    scales: Sequence[float],
    scale_tensors: Sequence[Tensor | None],  # 0-d, None for 1
    draws: Sequence[Draw],
    row_offset: int = 0,
) -> list[Tensor] | None:
    """-> t_j [M, R] fp32 = s_j (x * keep_j) a_j^T, views of one buffer."""
    packs = _packs(a, [factor.shape[0] for factor in a], x.shape[0], draws)
    if _alone(packs):
        return None
    parts = [_down(x, *_of(pack, a, scales, scale_tensors, draws), row_offset) for pack in packs]
    return _in_order(packs, parts)


def _down(
    x: Tensor,
    a: Sequence[Tensor],
    scales: Sequence[float],
    scale_tensors: Sequence[Tensor | None],
    draws: Sequence[Draw],
    row_offset: int,
) -> list[Tensor]:
    if len(a) == 1:
        return [
            lora_linear.lora_down(
                x, a[0], scales[0], scale_tensors[0], **draws[0], row_offset=row_offset
            )
        ]
    m, k = x.shape
    ranks, threshold = [factor.shape[0] for factor in a], draws[0]["threshold"]
    gpu, block_r = gpu_of(x), _block_r(ranks)
    arithmetic = arithmetic_of(gpu, x.dtype, a[0].dtype)
    tile = group_down_tile(gpu.capability, arithmetic, threshold > 0)
    programs = divide_up(m, tile.rows)
    splits, k_per_split = feature_splits(gpu, k, programs, tile)
    total = x.new_empty(m * sum(ranks), dtype=torch.float32)
    out = total if splits == 1 else x.new_empty((splits, m * sum(ranks)), dtype=torch.float32)
    offsets = [m * sum(ranks[:j]) for j in range(len(ranks))]
    starts = [out.view(-1)[offset:] for offset in offsets]
    bits = _random_bits(draws)
    branches = tuple(zip(a, starts, map(float, scales), scale_tensors, *bits, ranks, strict=True))
    with launch_device(x):
        launch(
            _lora_down_group_kernel,
            (programs, splits),
            x,
            branches,
            threshold,
            row_offset,
            m,
            k,
            x.stride(0),
            m * sum(ranks),
            k_per_split,
            BRANCHES=len(ranks),
            BLOCK_R=block_r,
            BLOCK_M=tile.rows,
            BLOCK_K=tile.columns,
            HAS_DROPOUT=threshold > 0,
            TENSOR_CORES=has_tensor_cores(gpu),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
        if splits > 1:
            sum_partials(out, total)
    parts = total.split([m * rank for rank in ranks])
    return [part.view(m, rank) for part, rank in zip(parts, ranks, strict=True)]


def lora_up_group(
    ts: Sequence[Tensor],  # [M, R] fp32, contiguous
    bs: Sequence[Tensor],  # [N, R]
    biases: Sequence[Tensor | None],  # [N]
    *,
    out_dtype: torch.dtype,
) -> list[Tensor] | None:
    """-> y0_i [M, N] in `out_dtype` = bias_i + t_i b_i^T."""
    packs = _packs(bs, [t.shape[1] for t in ts], ts[0].shape[0])
    if _alone(packs):
        return None
    return _in_order(packs, [_up(*_of(pack, ts, bs, biases), out_dtype) for pack in packs])


def _up(
    ts: Sequence[Tensor],
    bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out_dtype: torch.dtype,
) -> list[Tensor]:
    if len(ts) == 1:
        return [lora_linear.lora_up(ts[0], bs[0], biases[0], out_dtype=out_dtype)]
    ranks, m = [t.shape[1] for t in ts], ts[0].shape[0]
    gpu, block_r = gpu_of(ts[0]), _block_r(ranks)
    arithmetic = arithmetic_of(gpu, ts[0].dtype, bs[0].dtype, out_dtype)
    tile = up_tile(gpu.capability, arithmetic, block_r, False)
    widths = [b.shape[0] for b in bs]
    ys = [ts[0].new_empty((m, n), dtype=out_dtype) for n in widths]
    column_blocks = sum(divide_up(n, tile.columns) for n in widths)
    branches = tuple(zip(ts, bs, biases, ys, ranks, widths, strict=True))
    with launch_device(ts[0]):
        launch(
            _lora_up_group_kernel,
            (divide_up(m, tile.rows) * column_blocks,),
            branches,
            m,
            column_blocks,
            BRANCHES=len(ranks),
            BLOCK_R=block_r,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            TENSOR_CORES=has_tensor_cores(gpu),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
    return ys


def lora_up_backward_group(
    dys: Sequence[Tensor],  # [M, N], unit column stride
    ts: Sequence[Tensor],  # [M, R] fp32, contiguous
    bs: Sequence[Tensor],  # [N, R]
    scales: Sequence[float],
    scale_tensors: Sequence[Tensor | None],  # 0-d, None for 1
) -> tuple[list[Tensor], list[Tensor]] | None:
    """-> d_j [M, R] fp32 = s_j dy_j b_j, and db_j [N, R] in b's dtype = dy_j^T t_j."""
    packs = _packs(bs, [b.shape[1] for b in bs], dys[0].shape[0])
    if _alone(packs) or len({dy.dtype for dy in dys}) > 1:
        return None
    ds, dbs = [], []
    for pack in packs:
        pairs = _up_backward(*_of(pack, dys, ts, bs, scales, scale_tensors))
        ds.append(pairs[0])
        dbs.append(pairs[1])
    return _in_order(packs, ds), _in_order(packs, dbs)


def _up_backward(
    dys: Sequence[Tensor],
    ts: Sequence[Tensor],
    bs: Sequence[Tensor],
    scales: Sequence[float],
    scale_tensors: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor]]:
    ranks, m = [b.shape[1] for b in bs], dys[0].shape[0]
    gpu, block_r = gpu_of(dys[0]), _block_r(ranks)
    arithmetic = arithmetic_of(gpu, dys[0].dtype, bs[0].dtype)
    tile = group_pair_tile(gpu.capability, arithmetic, block_r)
    if tile is None or len(dys) == 1:
        singles = [
            lora_linear.lora_up_backward(*branch, need_d=True, need_db=True)
            for branch in zip(dys, ts, bs, scales, scale_tensors, strict=True)
        ]
        return [d for d, _ in singles], [db for _, db in singles]
    widths = [b.shape[0] for b in bs]
    column_blocks = [divide_up(n, tile.columns) for n in widths]
    # As for one branch: fill the multiprocessors twice, with 128 to 1024 rows a program.
    wanted = max(2 * gpu.multiprocessors // sum(column_blocks), 1)
    rows = min(max(divide_up(m, wanted), 128), 1024)
    rows_per_program = divide_up(rows, tile.rows) * tile.rows
    row_blocks = divide_up(m, rows_per_program)
    ds = [torch.empty_like(t) for t in ts]
    dbs = [torch.empty_like(b) for b in bs]
    d_parts = [d.new_empty((c, *d.shape)) for d, c in zip(ds, column_blocks, strict=True)]
    db_parts = [t.new_empty((row_blocks, *b.shape)) for t, b in zip(ts, bs, strict=True)]
    strides = [dy.stride(0) for dy in dys]
    operands = zip(dys, ts, bs, d_parts, db_parts, strict=True)
    facts = zip(map(float, scales), scale_tensors, ranks, widths, strides, strict=True)
    branches = tuple((*tensors, *rest) for tensors, rest in zip(operands, facts, strict=True))
    with launch_device(dys[0]):
        launch(
            _lora_up_backward_group_kernel,
            (row_blocks, sum(column_blocks)),
            branches,
            m,
            rows_per_program,
            BRANCHES=len(ranks),
            BLOCK_R=block_r,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            TENSOR_CORES=has_tensor_cores(gpu),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
        sum_group_partials([*zip(d_parts, ds, strict=True), *zip(db_parts, dbs, strict=True)])
    return ds, dbs


def lora_down_backward_group(
    ds: Sequence[Tensor],  # [M, R] fp32, contiguous
    a: Sequence[Tensor],  # [R, K]
    x: Tensor | None,  # [M, K], unit column stride; may be None if da is not needed
    draws: Sequence[Draw],
    *,
    row_offset: int = 0,
    dx_dtype: torch.dtype,
    need_dx: bool,
    need_da: bool,
) -> tuple[Tensor | None, list[Tensor] | None] | None:
    """-> dx0 [M, K] in `dx_dtype` = sum_j keep_j * (d_j a_j), and da_j [R, K] in a's dtype = d_j^T
    (x * keep_j).
    """
    packs = _packs(a, [d.shape[1] for d in ds], ds[0].shape[0], draws)
    if _alone(packs):
        return None
    dx = das = None
    if need_dx:
        for pack in packs:
            part = _input_gradient(*_of(pack, ds, a, draws), row_offset, dx_dtype)
            dx = part if dx is None else dx.add_(part)
    if need_da:
        assert x is not None
        parts = [_weight_grads(x, *_of(pack, ds, a, draws), row_offset) for pack in packs]
        das = _in_order(packs, parts)
    return dx, das


def _random_bits(draws: Sequence[Draw]) -> tuple[list[Tensor | None], list[int]]:
    seeds = [draw["seed"] if draw["threshold"] > 0 else None for draw in draws]
    return seeds, [draw["branch"] for draw in draws]


def _input_gradient(
    ds: Sequence[Tensor],
    a: Sequence[Tensor],
    draws: Sequence[Draw],
    row_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    if len(ds) == 1:
        dx, _ = lora_linear.lora_down_backward(
            ds[0], a[0], None, **draws[0], row_offset=row_offset,
            dx_dtype=dtype, need_dx=True, need_da=False,
        )  # fmt: skip
        return dx
    m, k = ds[0].shape[0], a[0].shape[1]
    ranks, threshold = [d.shape[1] for d in ds], draws[0]["threshold"]
    gpu, block_r = gpu_of(ds[0]), _block_r(ranks)
    arithmetic = arithmetic_of(gpu, ds[0].dtype, a[0].dtype, dtype)
    tile = group_input_gradient_tile(gpu.capability, arithmetic, block_r, threshold > 0)
    dx = ds[0].new_empty((m, k), dtype=dtype)
    with launch_device(dx):
        launch(
            _lora_input_gradient_group_kernel,
            (divide_up(m, tile.rows) * divide_up(k, tile.columns),),
            tuple(zip(ds, a, *_random_bits(draws), ranks, strict=True)),
            dx,
            threshold,
            row_offset,
            m,
            k,
            BRANCHES=len(ranks),
            BLOCK_R=block_r,
            BLOCK_M=tile.rows,
            BLOCK_K=tile.columns,
            HAS_DROPOUT=threshold > 0,
            TENSOR_CORES=has_tensor_cores(gpu),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
    return dx


def _weight_grads(
    x: Tensor,
    ds: Sequence[Tensor],
    a: Sequence[Tensor],
    draws: Sequence[Draw],
    row_offset: int,
) -> list[Tensor]:
    if len(ds) == 1:
        _, da = lora_linear.lora_down_backward(
            ds[0], a[0], x, **draws[0], row_offset=row_offset,
            dx_dtype=x.dtype, need_dx=False, need_da=True,
        )  # fmt: skip
        return [da]
    m, k = x.shape
    ranks, threshold = [d.shape[1] for d in ds], draws[0]["threshold"]
    gpu, block_r = gpu_of(x), _block_r(ranks)
    arithmetic = arithmetic_of(gpu, x.dtype, ds[0].dtype)
    tile = group_weight_grad_tile(gpu.capability, arithmetic, threshold > 0)
    programs = divide_up(k, tile.columns)
    splits, rows_per_split = row_splits(gpu, m, programs, tile)
    das = [torch.empty_like(factor) for factor in a]
    parts = das
    if splits > 1:
        parts = [da.new_empty((splits, *da.shape), dtype=torch.float32) for da in das]
    with launch_device(x):
        launch(
            _lora_weight_grad_group_kernel,
            (programs, splits),
            x,
            tuple(zip(ds, parts, *_random_bits(draws), ranks, strict=True)),
            threshold,
            row_offset,
            m,
            k,
            x.stride(0),
            rows_per_split,
            BRANCHES=len(ranks),
            BLOCK_R=block_r,
            BLOCK_M=tile.rows,
            BLOCK_K=tile.columns,
            HAS_DROPOUT=threshold > 0,
            TENSOR_CORES=has_tensor_cores(gpu),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
        if splits > 1:
            sum_group_partials([*zip(parts, das, strict=True)])
    return das

"""The second pass of a reduction that is split among programs: their results in fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tables import divide_up


@triton.jit
def sum_block(partial_ptr, out_ptr, scale, scale_ptr, numel, splits, block, BLOCK: tl.constexpr):
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(splits):
        acc += tl.load(partial_ptr + i, mask=inside, other=0.0)
        partial_ptr += numel
    if scale_ptr is not None:
        scale = scale * tl.load(scale_ptr).to(tl.float32)
    tl.store(out_ptr + i, (acc * scale).to(out_ptr.dtype.element_ty), mask=inside)


# Floor: read 4 * splits * numel, write numel. The order of addition is fixed: split 0, 1, 2, ...
@triton.jit(do_not_specialize=["splits"])
def _sum_partials_kernel(
    partial_ptr,  # [splits, numel] fp32
    out_ptr,  # [numel]
    scale,
    scale_ptr,  # 0-d or None
    numel,
    splits,
    BLOCK: tl.constexpr,
):
    sum_block(partial_ptr, out_ptr, scale, scale_ptr, numel, splits, tl.program_id(0), BLOCK)


# Two independent sums in one launch: the first `blocks` programs do the first one.
@triton.jit(do_not_specialize=["splits", "second_splits", "blocks"])
def _sum_two_partials_kernel(
    partial_ptr,  # [splits, numel] fp32
    out_ptr,  # [numel]
    scale,  # of the first
    scale_ptr,  # 0-d or None, of the first
    numel,
    splits,
    second_partial_ptr,  # [second_splits, second_numel] fp32
    second_out_ptr,  # [second_numel]
    second_numel,
    second_splits,
    blocks,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    if block < blocks:
        sum_block(partial_ptr, out_ptr, scale, scale_ptr, numel, splits, block, BLOCK)
    else:
        sum_block(
            second_partial_ptr,
            second_out_ptr,
            1.0,
            None,
            second_numel,
            second_splits,
            block - blocks,
            BLOCK,
        )


_BLOCK = 512  # 16 bytes per thread


def sum_partials(
    partial: Tensor,  # [splits, ...] fp32
    out: Tensor,  # [...]
    scale: float = 1.0,
    scale_tensor: Tensor | None = None,
) -> None:
    """out = scale * scale_tensor * the sum of the partial results; the caller sets the device."""
    launch(
        _sum_partials_kernel,
        (divide_up(out.numel(), _BLOCK),),
        partial,
        out,
        scale,
        scale_tensor,
        out.numel(),
        partial.shape[0],
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )


def sum_two_partials(
    first: tuple[Tensor, Tensor],  # partial [splits, ...] fp32, out [...]
    second: tuple[Tensor, Tensor],  # likewise
    scale: float = 1.0,  # of the first
    scale_tensor: Tensor | None = None,  # of the first
) -> None:
    """Two calls of :func:`sum_partials` in one launch; the caller sets the device."""
    (partial, out), (second_partial, second_out) = first, second
    blocks = divide_up(out.numel(), _BLOCK)
    launch(
        _sum_two_partials_kernel,
        (blocks + divide_up(second_out.numel(), _BLOCK),),
        partial,
        out,
        scale,
        scale_tensor,
        out.numel(),
        partial.shape[0],
        second_partial,
        second_out,
        second_out.numel(),
        second_partial.shape[0],
        blocks,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )


# The sums of a whole group in one launch, block after block.
@triton.jit
def _sum_group_partials_kernel(
    sums,  # partial [splits, numel] fp32, out [numel], numel, splits
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    first = 0
    for j in tl.static_range(len(sums)):
        partial_ptr, out_ptr, numel, splits = sums[j]
        last = first + tl.cdiv(numel, BLOCK)
        if (pid >= first) & (pid < last):
            sum_block(partial_ptr, out_ptr, 1.0, None, numel, splits, pid - first, BLOCK)
        first = last


def sum_group_partials(sums: Sequence[tuple[Tensor, Tensor]]) -> None:
    """out = the sum of partial [splits, ...] fp32, for each pair of partial and out; the caller
    sets the device.
    """
    items = tuple((partial, out, out.numel(), partial.shape[0]) for partial, out in sums)
    blocks = sum(divide_up(out.numel(), _BLOCK) for _, out in sums)
    launch(
        _sum_group_partials_kernel,
        (blocks,),
        items,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )


# Floor: read 4 * rows * n, write 4 n. For the hundreds of partial rows that persistent programs
# leave: a tile of them is in flight at a time, where `_sum_partials_kernel` waits for each in turn.
# The order is fixed: tile by tile, then a tree over the rows of a tile.
@triton.jit(do_not_specialize=["rows"])
def _sum_rows_kernel(
    partial_ptr,  # [rows, n] fp32
    out_ptr,  # [n] fp32
    n,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lines = tl.arange(0, BLOCK_M)
    inside = columns < n
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, rows, BLOCK_M):
        line = first + lines
        at = line.to(tl.int64)[:, None] * n + columns[None, :]
        acc += tl.load(partial_ptr + at, mask=(line < rows)[:, None] & inside[None, :], other=0.0)
    tl.store(out_ptr + columns, tl.sum(acc, 0), mask=inside)


def sum_rows(partial: Tensor) -> Tensor:  # [rows, n] fp32 -> [n] fp32
    """The sum of many partial results in fixed order; the caller sets the device."""
    rows, n = partial.shape
    out = partial.new_empty(n)
    columns = 32  # a line of 128 bytes
    launch(
        _sum_rows_kernel,
        (divide_up(n, columns),),
        partial,
        out,
        n,
        rows,
        BLOCK_M=64,
        BLOCK_N=columns,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out

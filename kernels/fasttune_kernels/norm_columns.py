"""Gradients of a norm's weight and bias where the row kernel does not add them up on its way.

That is the case if x needs no gradient, so that nothing is to be known of a whole row, and for rows
whose sums do not fit the registers of a program beside the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .partials import sum_rows
from .tables import MAX_REGISTERS, divide_up, gpu_of, launch_device


# Floor: read M H of dy, and of x for the weight, once; write the partial sums, 4 H a split of the
# rows; about 4 operations an element. A program owns 128 columns (256 bytes in 16 bits) and walks
# down its rows, several tiles ahead.
@triton.jit(do_not_specialize=["M", "rows_per_program"])
def _norm_column_sums_kernel(
    dy_ptr,  # [M, H], columns adjacent
    x_ptr,  # [M, H], columns adjacent, or None without dweight
    mean_ptr,  # [M] fp32 or None
    rstd_ptr,  # [M] fp32
    dweight_ptr,  # [splits, H] fp32 or None
    dbias_ptr,  # [splits, H] fp32 or None
    M,
    H,
    stride_dym: tl.int64,
    stride_xm: tl.int64,
    rows_per_program,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = (tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    split = tl.program_id(1).to(tl.int64)
    begin = split * rows_per_program
    weighted = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    plain = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    for first in tl.range(
        begin, tl.minimum(begin + rows_per_program, M), BLOCK_M, num_stages=STAGES
    ):
        row = first + tl.arange(0, BLOCK_M)
        rows = row[:, None]
        inside = (rows < M) & (columns < H)
        dy = tl.load(dy_ptr + rows * stride_dym + columns, mask=inside, other=0.0).to(tl.float32)
        if dweight_ptr is not None:
            x = tl.load(x_ptr + rows * stride_xm + columns, mask=inside, other=0.0).to(tl.float32)
            if mean_ptr is not None:
                x -= tl.load(mean_ptr + row, mask=row < M, other=0.0)[:, None]
            weighted += dy * (x * tl.load(rstd_ptr + row, mask=row < M, other=0.0)[:, None])
        if dbias_ptr is not None:
            plain += dy
    at = split * H + columns
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, tl.sum(weighted, 0, keep_dims=True), mask=columns < H)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, tl.sum(plain, 0, keep_dims=True), mask=columns < H)


def column_sums(
    dy: Tensor,  # [M, H], M > 0, unit column stride
    x: Tensor,  # [M, H], unit column stride
    mean: Tensor | None,  # [M] fp32, None for 0
    rstd: Tensor,  # [M] fp32
    *,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """-> dweight [H] = sum over the rows of dy (x - mean) rstd, dbias [H] of dy, both fp32."""
    m, h = x.shape
    block_m, block_h = 16, 128
    columns = divide_up(h, block_h)
    # Fill the multiprocessors twice, with at least 64 rows per program.
    splits = min(divide_up(2 * gpu_of(x).multiprocessors, columns), divide_up(m, 64))
    rows_per_program = divide_up(divide_up(m, splits), block_m) * block_m
    splits = divide_up(m, rows_per_program)
    dweight = rstd.new_empty((splits, h), dtype=torch.float32) if need_dweight else None
    dbias = rstd.new_empty((splits, h), dtype=torch.float32) if need_dbias else None
    with launch_device(x):
        launch(
            _norm_column_sums_kernel,
            (columns, splits),
            dy,
            x if need_dweight else None,
            mean,
            rstd,
            dweight,
            dbias,
            m,
            h,
            dy.stride(0),
            x.stride(0),
            rows_per_program,
            BLOCK_M=block_m,
            BLOCK_H=block_h,
            STAGES=4 if gpu_of(x).capability >= 80 else 1,
            num_warps=4,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
        return (
            None if dweight is None else sum_rows(dweight),
            None if dbias is None else sum_rows(dbias),
        )

"""The gradients of (IA)^3's scale, y = x scale: both from one pass over dy and x.

The forward, and the backward of a frozen scale, are `scaled_sum`. Legend: M rows (tokens), N
features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .partials import sum_rows
from .tables import MAX_REGISTERS, divide_up, gpu_of, launch_device

_ROWS, _COLUMNS, _WARPS = 16, 128, 4  # 16 elements a thread: 32 bytes of each 16-bit operand


# Floor per element in 16 bits: 4 bytes read and 2 written, three operations; the partial sums are 4
# N a split of the rows. A program owns 128 columns (256 bytes in 16 bits) and walks down its rows,
# several tiles ahead.
@triton.jit(do_not_specialize=["M", "rows_per_program"])
def _ia3_scale_backward_kernel(
    dy_ptr,  # [M, N], columns adjacent
    x_ptr,  # [M, N], columns adjacent
    scale_ptr,  # [N]
    dx_ptr,  # [M, N] or None
    dscale_ptr,  # [splits, N] fp32
    M,
    N,
    stride_dym: tl.int64,
    stride_xm: tl.int64,
    rows_per_program,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    split = tl.program_id(1).to(tl.int64)
    begin = split * rows_per_program
    scale = tl.load(scale_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in tl.range(
        begin, tl.minimum(begin + rows_per_program, M), BLOCK_M, num_stages=STAGES
    ):
        rows = (first + tl.arange(0, BLOCK_M))[:, None]
        inside = (rows < M) & (columns < N)
        dy = tl.load(dy_ptr + rows * stride_dym + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows * stride_xm + columns, mask=inside, other=0.0).to(tl.float32)
        sums += dy * x
        if dx_ptr is not None:
            dx = (dy * scale).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + rows * N + columns, dx, mask=inside)
    tl.store(dscale_ptr + split * N + columns, tl.sum(sums, 0, keep_dims=True), mask=columns < N)


def ia3_scale_backward(
    dy: Tensor,  # [M, N] fp32 / bf16 / fp16, unit column stride
    x: Tensor,  # [M, N], likewise
    scale: Tensor,  # [N]
    *,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    """-> dx [M, N] = dy scale in the dtype of dy, or None; dscale [N] fp32 = the sum of dy x."""
    m, n = x.shape
    dx = torch.empty((m, n), dtype=dy.dtype, device=dy.device) if need_dx else None
    if m == 0 or n == 0:
        return dx, torch.zeros(n, dtype=torch.float32, device=dy.device)
    columns = divide_up(n, _COLUMNS)
    # Fill the multiprocessors twice, with at least 64 rows per program.
    splits = min(divide_up(2 * gpu_of(x).multiprocessors, columns), divide_up(m, 64))
    rows_per_program = divide_up(divide_up(m, splits), _ROWS) * _ROWS
    splits = divide_up(m, rows_per_program)
    partial = torch.empty((splits, n), dtype=torch.float32, device=dy.device)
    with launch_device(x):
        launch(
            _ia3_scale_backward_kernel,
            (columns, splits),
            dy,
            x,
            scale.contiguous(),
            dx,
            partial,
            m,
            n,
            dy.stride(0),
            x.stride(0),
            rows_per_program,
            BLOCK_M=_ROWS,
            BLOCK_N=_COLUMNS,
            STAGES=4 if gpu_of(x).capability >= 80 else 1,
            num_warps=_WARPS,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
        return dx, sum_rows(partial)

"""An activation with the bias of the product before it, y = act(x + bias), and its gradient.

Legend: M rows (tokens), N features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_with_slope
from .elementwise import block_of, joined_shape
from .launch import launch
from .tables import MAX_REGISTERS, divide_up, launch_device

# Rows of a program that share its piece of the bias: read once a row, a bias of fp32 would cost
# twice the traffic of x in 16 bits, from the second-level cache.
ROWS_PER_PROGRAM = 4


# Floor per element in 16 bits: 2 bytes read and 2 written, about 25 operations with one exponential
# and one division (gelu 40; an H100 does 34 in that time); the bias is read once per 4 rows. All
# loads of a program are in flight before the arithmetic starts.
@triton.jit(do_not_specialize=["M"])
def _bias_activation_forward_kernel(
    x_ptr,  # [M, N], columns adjacent
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N]
    M,
    N,
    stride_xm: tl.int64,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pieces = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // pieces).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % pieces).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (n < N)[None, :]
    z = tl.load(x_ptr + rows[:, None] * stride_xm + n[None, :], mask=inside, other=0.0)
    z = z.to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y = activate(z, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * N + n[None, :], y, mask=inside)


# Floor per element in 16 bits: 4 bytes read and 2 written, about 35 operations.
@triton.jit(do_not_specialize=["M"])
def _bias_activation_backward_kernel(
    dy_ptr,  # [M, N], columns adjacent
    x_ptr,  # [M, N], columns adjacent
    bias_ptr,  # [N] or None
    dx_ptr,  # [M, N]
    M,
    N,
    stride_ym: tl.int64,
    stride_xm: tl.int64,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pieces = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // pieces).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % pieces).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (n < N)[None, :]
    dy = tl.load(dy_ptr + rows[:, None] * stride_ym + n[None, :], mask=inside, other=0.0)
    z = tl.load(x_ptr + rows[:, None] * stride_xm + n[None, :], mask=inside, other=0.0)
    z = z.to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    _, slope = activate_with_slope(z, ACTIVATION)
    dx = (dy.to(tl.float32) * slope).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + rows[:, None] * N + n[None, :], dx, mask=inside)


def _tile(rows: int, columns: int, has_bias: bool, *matrices: Tensor) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program."""
    block, warps = block_of(columns * (ROWS_PER_PROGRAM if has_bias else 1), *matrices)
    block_m = ROWS_PER_PROGRAM if has_bias else 1
    return block_m, block // block_m, warps


def bias_activation_forward(
    x: Tensor,  # [M, N] fp32 / bf16 / fp16, unit column stride
    bias: Tensor | None,  # [N], any of the dtypes
    *,
    activation: str,
) -> Tensor:
    """-> y [M, N] = act(x + bias), in the dtype that torch promotes the two to."""
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows, columns = joined_shape(x) if bias is None else x.shape
    block_m, block_n, warps = _tile(rows, columns, bias is not None, x, y)
    with launch_device(x):
        launch(
            _bias_activation_forward_kernel,
            (divide_up(rows, block_m) * divide_up(columns, block_n),),
            x,
            None if bias is None else bias.contiguous(),
            y,
            rows,
            columns,
            x.stride(0),
            ACTIVATION=activation,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
    return y


def bias_activation_backward(
    dy: Tensor,  # [M, N] fp32 / bf16 / fp16, unit column stride
    x: Tensor,  # [M, N], likewise
    bias: Tensor | None,  # [N], any of the dtypes
    *,
    activation: str,
    dx_dtype: torch.dtype,
) -> Tensor:
    """-> dx [M, N] = dy act'(x + bias), in `dx_dtype`."""
    dx = torch.empty(x.shape, dtype=dx_dtype, device=x.device)
    if dx.numel() == 0:
        return dx
    rows, columns = joined_shape(dy, x) if bias is None else x.shape
    block_m, block_n, warps = _tile(rows, columns, bias is not None, dy, x, dx)
    with launch_device(x):
        launch(
            _bias_activation_backward_kernel,
            (divide_up(rows, block_m) * divide_up(columns, block_n),),
            dy,
            x,
            None if bias is None else bias.contiguous(),
            dx,
            rows,
            columns,
            dy.stride(0),
            x.stride(0),
            ACTIVATION=activation,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
    return dx


def column_sum(x: Tensor) -> Tensor:
    """The sum [N] of the rows of x [M, N] in fp32: torch's, whose order the shape fixes."""
    return x.sum(0, dtype=torch.float32)

"""An activation with the bias before it, and the sum of columns, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune._native._activation import activation_codes
from fasttune._native._extension import cpu, fp32, room, threads


def bias_activation_forward(
    x: Tensor,  # [M, N]
    bias: Tensor | None,  # [N]
    *,
    activation: str,
) -> Tensor:
    """y [M, N] = act(x + bias), in the dtype that torch promotes the two to."""
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    y = torch.empty(x.shape, dtype=dtype)
    row = None if bias is None else fp32(bias)
    cpu().bias_activation_forward(
        x,
        0 if row is None else row.data_ptr(),
        y,
        activation_codes()[activation],
        threads(),
    )
    return y


def bias_activation_backward(
    dy: Tensor,  # [M, N]
    x: Tensor,  # [M, N]
    bias: Tensor | None,  # [N]
    *,
    activation: str,
    dx_dtype: torch.dtype,
) -> Tensor:
    """dx [M, N] = dy act'(x + bias), in ``dx_dtype``."""
    dx = torch.empty(x.shape, dtype=dx_dtype)
    row = None if bias is None else fp32(bias)
    cpu().bias_activation_backward(
        dy,
        x,
        0 if row is None else row.data_ptr(),
        dx,
        activation_codes()[activation],
        threads(),
    )
    return dx


def column_sum(x: Tensor) -> Tensor:
    """The sum [N] of the rows of x [M, N] in fp32, in an order that the shape fixes."""
    rows, cols = x.shape
    out = torch.empty(cols, dtype=torch.float32)
    partial = room("column_sum", -(-rows // cpu().SUM_ROWS) * cols)
    cpu().column_sum(x, partial, out.data_ptr(), threads())
    return out

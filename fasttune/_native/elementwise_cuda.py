"""The elementwise parts of a bottleneck adapter, in CUDA C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune._native._activation import activation_codes
from fasttune._native._cuda import launch
from fasttune._native._extension import DTYPE_CODES


def bias_activation_forward(
    x: Tensor,  # [M, N], unit column stride
    bias: Tensor | None,  # [N]
    *,
    activation: str,
) -> Tensor:
    """y [M, N] = act(x + bias), in the dtype that torch promotes the two to."""
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    return _bias_activation(None, x, bias, activation, dtype)


def bias_activation_backward(
    dy: Tensor,  # [M, N], unit column stride
    x: Tensor,  # [M, N], likewise
    bias: Tensor | None,  # [N]
    *,
    activation: str,
    dx_dtype: torch.dtype,
) -> Tensor:
    """dx [M, N] = dy act'(x + bias), in ``dx_dtype``."""
    return _bias_activation(dy, x, bias, activation, dx_dtype)


def _bias_activation(
    dy: Tensor | None, x: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    row = None if bias is None else bias.contiguous()
    launch(
        "bias_activation",
        x.device,
        *(_matrix(dy), _matrix(x), _matrix(row), _matrix(out), *x.shape),
        activation_codes()[activation],
        reachable=[t for t in (dy, x, row, out) if t is not None],
    )
    return out


def scaled_sum(
    x: Tensor,  # [M, N], unit column stride
    addend: Tensor | None,  # [M, N], likewise
    column_scale: Tensor | None,  # [N], unit stride
    scale: float,
    *,
    seed: Tensor | None,  # 0-d int64
    threshold: int,  # 0: no dropout
    out_dtype: torch.dtype,
) -> Tensor:
    """addend + keep * x scale column_scale, [M, N] in ``out_dtype``."""
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    launch(
        "scaled_sum",
        x.device,
        *(_matrix(x), _matrix(addend), _matrix(column_scale), _matrix(out), *x.shape),
        *(seed if threshold else None, threshold, float(scale)),
        reachable=[t for t in (x, addend, column_scale, out) if t is not None],
    )
    return out


def column_sum(x: Tensor) -> Tensor:
    """The sum [N] of the rows of x [M, N] in fp32: torch's, whose order the shape fixes."""
    return x.sum(0, dtype=torch.float32)


def _matrix(tensor: Tensor | None) -> tuple[int, int, int]:
    """Address, stride and dtype; a vector has stride 0."""
    if tensor is None:
        return 0, 0, 0
    stride = tensor.stride(0) if tensor.dim() == 2 else 0
    return tensor.data_ptr(), stride, DTYPE_CODES[tensor.dtype]

"""A whole bottleneck adapter in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttune._native._activation import activation_codes
from fasttune._native._extension import DTYPE_CODES, cpu, matrix, threads
from fasttune._native.base_product import has_base_product
from fasttune._native.lora_linear import MAX_RANK, dropout_of

_FEWEST_ROWS = 64  # on tiles: below, a call is mostly the packing of the weights
_NARROW = 48
_ADDENDS = (torch.bfloat16, torch.float32)


def takes_bottleneck(
    x: Tensor, down: Tensor, up: Tensor, dtype: torch.dtype, wide: Tensor | None, threshold: int
) -> bool:
    """True if the kernels take x [*, K] and the weights [R, K] and [H, R], computed in ``dtype``;
    ``wide`` is the residual, or the gradient of the output.

    Tiles take bf16, and fp32 where it is wide enough for its products to outweigh the splitting of
    operands; LoRA's products take narrow ones in fp32.
    """
    rank = down.shape[0]
    if up.numel() == 0 or rank > MAX_RANK:
        return False
    tiles = x.numel() >= _FEWEST_ROWS * max(1, x.shape[-1]) and has_base_product()
    if dtype == torch.float32:
        same = x.dtype == down.dtype == up.dtype == dtype
        if not same or (wide is not None and wide.dtype != dtype):
            return False
        return tiles if rank > _NARROW else not (rank % cpu().LANES or threshold)
    if dtype != torch.bfloat16 or x.dtype not in _ADDENDS:
        return False
    return tiles and (wide is None or wide.dtype in _ADDENDS)


def bottleneck_forward(
    x: Tensor,  # [M, K]
    residual: Tensor | None,  # [M, H]
    down: Tensor,  # [R, K]
    down_bias: Tensor | None,  # [R]
    up: Tensor,  # [H, R]
    up_bias: Tensor | None,  # [H]
    scale: Tensor | None,  # [1] or [H]
    factor: float,
    activation: str,
    *,
    seed: Tensor | None,
    threshold: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """y [M, H] = residual + keep * factor scale (act(z) U^T + b_U) in ``out_dtype``, rounded once,
    and z [M, R] = x D^T + b_D in ``dtype``, that of the operands. None if it gave up: tiles cannot
    take fp32 values that are not finite.
    """
    x, down, up = _rows(x, dtype), _whole(down, dtype), _whole(up, dtype)
    down_bias, up_bias = _vector(down_bias), _vector(up_bias)
    scale = _vector(scale if scale is None else scale.expand(up.shape[0]))
    rows = x.shape[0]
    z = torch.empty(rows, down.shape[0], dtype=dtype)
    y = torch.empty(rows, up.shape[0], dtype=out_dtype)
    done = cpu().bottleneck_forward(
        matrix(x),
        matrix(down),
        matrix(up),
        _flat(down_bias),
        _code(activation),
        factor,
        dropout_of(seed, threshold, 0, 0),
        None if residual is None else matrix(residual),
        _flat(up_bias),
        _flat(scale),
        z.data_ptr(),
        _flat(y),
        threads(),
    )
    return (y, z) if done else None


def bottleneck_backward(
    dy: Tensor,  # [M, H]
    x: Tensor,  # [M, K]
    z: Tensor,  # [M, R]
    down: Tensor,  # [R, K]
    up: Tensor,  # [H, R]
    factor: float,
    activation: str,
    *,
    seed: Tensor | None,
    threshold: int,
    residual_is_x: bool,
    outer_factor: float,
    dtypes: Sequence[torch.dtype | None],
) -> list[Tensor | None] | None:
    """With dz = factor (keep * dy) U act'(z): dx = dy or 0 + dz D, dz^T x, the sum of dz over the
    rows, and outer_factor times (keep * dy)^T act(z) and the sum of keep * dy.

    ``dtypes`` are those of the five; None for what is not wanted. None if it gave up, as above.
    """
    shapes = (x.shape, down.shape, down.shape[:1], up.shape, up.shape[:1])
    found = [
        None if dtype is None else torch.empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    dtype, z = z.dtype, z.contiguous()
    x, down, up, own = _rows(x, dtype), _whole(down, dtype), _whole(up, dtype), _rows(dy, dtype)
    done = cpu().bottleneck_backward(
        matrix(x),
        matrix(down),
        matrix(up),
        _code(activation),
        factor,
        dropout_of(seed, threshold, 0, 0),
        matrix(own),
        z.data_ptr(),
        matrix(dy) if residual_is_x else None,
        outer_factor,
        *map(_flat, found),
        threads(),
    )
    return found if done else None


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _whole(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.contiguous() if weight.dtype == dtype else weight.to(dtype).contiguous()


def _vector(x: Tensor | None) -> Tensor | None:
    return x if x is None or (x.stride(0) == 1 and not x.is_neg()) else x.resolve_neg().contiguous()


def _flat(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), DTYPE_CODES[x.dtype])


def _code(activation: str) -> int:
    return -1 if activation == "identity" else activation_codes()[activation]

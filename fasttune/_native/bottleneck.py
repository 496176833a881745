"""A whole bottleneck adapter in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttune._native._activation import activation_codes
from fasttune._native._extension import cpu, threads
from fasttune._native.base_product import has_base_product
from fasttune._native.lora_linear import MAX_RANK, dropout_of

_FEWEST_ROWS = 64  # on tiles: below, a call is mostly the packing of the weights
_NARROW = 48
_ADDENDS = {torch.bfloat16, torch.float32}


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
    if dtype == torch.float32:
        same = x.dtype == down.dtype == up.dtype == dtype
        if not same or (wide is not None and wide.dtype != dtype):
            return False
        if rank <= _NARROW:
            return not (rank % cpu().LANES or threshold)
    else:
        dtypes = (x.dtype,) if wide is None else (x.dtype, wide.dtype)
        if dtype != torch.bfloat16 or not _ADDENDS.issuperset(dtypes):
            return False
    return x.numel() >= _FEWEST_ROWS * max(1, x.shape[-1]) and has_base_product()


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
    outputs, rank = up.shape
    z = torch.empty(rows, rank, dtype=dtype)
    y = torch.empty(rows, outputs, dtype=out_dtype)
    done = cpu().bottleneck_forward(
        x, down, up, down_bias, _code(activation), factor, dropout_of(seed, threshold, 0, 0),
        residual, up_bias, scale, z, y, threads(),
    )  # fmt: skip
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
    outputs, rank = up.shape
    found = [
        _like(x, dtypes[0]),
        _like(down, dtypes[1]),
        None if dtypes[2] is None else torch.empty(rank, dtype=dtypes[2]),
        _like(up, dtypes[3]),
        None if dtypes[4] is None else torch.empty(outputs, dtype=dtypes[4]),
    ]
    dtype, z = z.dtype, z.contiguous()
    x, down, up, own = _rows(x, dtype), _whole(down, dtype), _whole(up, dtype), _rows(dy, dtype)
    done = cpu().bottleneck_backward(
        x, down, up, _code(activation), factor, dropout_of(seed, threshold, 0, 0), own, z,
        dy if residual_is_x else None, outer_factor, *found, threads(),
    )  # fmt: skip
    return found if done else None


def _like(x: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """An output of that shape; a few times as fast as ``torch.empty`` of a torch.Size."""
    if dtype is None:
        return None
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _whole(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight if weight.dtype == dtype else weight.to(dtype)).resolve_neg().contiguous()


def _vector(x: Tensor | None) -> Tensor | None:
    return x if x is None or (x.stride(0) == 1 and not x.is_neg()) else x.resolve_neg().contiguous()


def _code(activation: str) -> int:
    return -1 if activation == "identity" else activation_codes()[activation]

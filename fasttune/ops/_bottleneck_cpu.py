"""bottleneck on a CPU: whole in C++, or the vendor's products and kernels around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune import _native
from fasttune.ops import _bottleneck_products, _dropout


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """The arguments of ``_bottleneck_products.forward_with`` but for the primitives."""
    x, residual, down, down_bias, up, up_bias, scale, factor, *facts = args
    activation, threshold, seed, dtype, out_dtype = facts
    found = None
    if _native.takes_bottleneck(x, down, up, dtype, residual, threshold):
        found = _native.bottleneck_forward(
            x, residual, down, down_bias, up, up_bias, scale,
            factor * _dropout.keep_scale(threshold), activation, seed=seed, threshold=threshold,
            dtype=dtype, out_dtype=out_dtype,
        )  # fmt: skip
    return _bottleneck_products.forward_with(_native, *args) if found is None else found


def backward(*args: Any) -> list[Tensor]:
    """The arguments of ``_bottleneck_products.backward_with`` but for the primitives."""
    dy, x, z, down, down_bias, up, up_bias, scale, factor, *facts = args
    activation, threshold, seed, dtype, residual_is_x, needs = facts
    if not _native.takes_bottleneck(x, down, up, dtype, dy, threshold):
        return _bottleneck_products.backward_with(_native, *args)
    need_x, need_down, need_down_bias, need_up, need_up_bias, need_scale = needs
    whole = factor * _dropout.keep_scale(threshold)
    # A trained scale needs the sums without it, in fp32.
    outer_dtype = up.dtype if scale is None else torch.float32
    bias_dtype = outer_dtype if scale is not None or up_bias is None else up_bias.dtype
    wanted = (
        x.dtype if need_x else None,
        down.dtype if need_down else None,
        down_bias.dtype if need_down_bias and down_bias is not None else None,
        outer_dtype if need_up or need_scale else None,
        bias_dtype if need_up_bias or (need_scale and up_bias is not None) else None,
    )
    weight = up if scale is None else up.to(torch.float32) * scale.to(torch.float32).view(-1, 1)
    found = _native.bottleneck_backward(
        dy, x, z, down, weight, whole, activation, seed=seed, threshold=threshold,
        residual_is_x=residual_is_x, outer_factor=whole if scale is None else 1.0, dtypes=wanted,
    )  # fmt: skip
    if found is None:
        return _bottleneck_products.backward_with(_native, *args)
    grads = [grad for grad in found[:3] if grad is not None]
    if scale is None:
        return grads + [grad for grad in found[3:] if grad is not None]
    return grads + _bottleneck_products.up_gradients(
        found[3], found[4], up, up_bias, scale, whole, needs[3:]
    )

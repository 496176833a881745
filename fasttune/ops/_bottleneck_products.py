"""bottleneck in terms of the vendor's products and the elementwise primitives of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from fasttune import _native
from fasttune.ops import _dropout, _gemm


def forward_with(
    prims: ModuleType,
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    factor: float,
    activation: str,
    threshold: int,
    seed: Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    z = _linear(x, down, down_bias, dtype)
    h = _activated(prims, z, activation)
    whole = factor * _dropout.keep_scale(threshold)
    if residual is None and scale is None and whole == 1.0:
        return _linear(h, up, up_bias, dtype).to(out_dtype), z
    u = _widened(prims, h, up, up_bias, dtype)
    columns = None if scale is None else scale.expand(u.shape[1]).contiguous()
    draw = {"seed": seed, "threshold": threshold}
    return prims.scaled_sum(u, residual, columns, whole, out_dtype=out_dtype, **draw), z


def backward_with(
    prims: ModuleType,
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    factor: float,
    activation: str,
    threshold: int,
    seed: Tensor | None,
    dtype: torch.dtype,
    residual_is_x: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The wide gradient is masked, never scaled: its scales go to the thin products."""
    need_x, need_down, need_down_bias, need_up, need_up_bias, need_scale = needs
    whole = factor * _dropout.keep_scale(threshold)
    masked = dy.to(dtype)
    if threshold:
        draw = {"seed": seed, "threshold": threshold}
        masked = prims.scaled_sum(masked, None, None, 1.0, out_dtype=dtype, **draw)
    dz = _inner_gradient(prims, masked, z, up, scale, whole, activation, dtype)
    grads = []
    if need_x:
        addend = dy if residual_is_x else None
        grads.append(_input_gradient(dz, down, addend, dtype).to(x.dtype))
    if need_down:
        grads.append(_gemm.weight_gradient(dz, x, down.dtype))
    if need_down_bias and down_bias is not None:
        grads.append(prims.column_sum(dz).to(down_bias.dtype))
    outer = sums = None
    if need_up or need_scale:
        exact = up.dtype if scale is None and whole == 1.0 else torch.float32
        outer = _gemm.weight_gradient(masked, _activated(prims, z, activation), exact)
    if need_up_bias or (need_scale and up_bias is not None):
        sums = prims.column_sum(masked)
    return grads + up_gradients(outer, sums, up, up_bias, scale, whole, needs[3:])


def up_gradients(
    outer: Tensor | None,
    sums: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    whole: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of U, b_U and the scale.

    Args:
        outer: (keep dy)^T h [H, R], if U or the scale needs it.
        sums: the sum [H] of keep dy over the rows, if b_U or the scale needs it.
        needs: of U, b_U and the scale.
    """
    need_up, need_up_bias, need_scale = needs
    grads = []
    rows = whole if scale is None else whole * scale.to(torch.float32).view(-1, 1)  # of [H, 1]
    if need_up and outer is not None:
        grads.append(outer if scale is None and whole == 1.0 else (outer * rows).to(up.dtype))
    if need_up_bias and sums is not None and up_bias is not None:
        plain = scale is None and whole == 1.0
        total = sums if plain else (sums.view(-1, 1) * rows).view(-1)
        grads.append(total.to(up_bias.dtype))
    if need_scale and outer is not None and scale is not None:
        # d / d scale of sum(dy scale u) = sum(dy u) = <dy^T h, W> + <sum of dy, bias>.
        dots = (outer * up).sum(1)
        if sums is not None and up_bias is not None:
            dots = dots + sums * up_bias
        grads.append(whole * (dots if scale.numel() > 1 else dots.sum().view(1)))
    return grads


def _inner_gradient(
    prims: ModuleType,
    masked: Tensor,
    z: Tensor,
    up: Tensor,
    scale: Tensor | None,
    whole: float,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """dz [M, R]."""
    weight = up
    if scale is not None:
        weight = up.to(torch.float32) * scale.to(torch.float32).view(-1, 1)
    dh = _product(masked, weight, dtype, whole)
    if activation == "identity":
        return dh
    dz: Tensor = prims.bias_activation_backward(dh, z, None, activation=activation, dx_dtype=dtype)
    return dz


def _activated(prims: ModuleType, z: Tensor, activation: str) -> Tensor:
    if activation == "identity":
        return z
    h: Tensor = prims.bias_activation_forward(z, None, activation=activation)
    return h


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + bias in ``dtype``."""
    if _gemm.through_fp32(x.device, dtype):
        y = _gemm.linear_fp32(x, weight)
        return (y if bias is None else y.add_(bias)).to(dtype, copy=True)
    return functional.linear(
        x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    )


def _widened(
    prims: ModuleType, h: Tensor, up: Tensor, up_bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """u [M, H]; on the CPU in a scratch buffer, as fresh memory costs a fault for each page."""
    if prims is not _native or _gemm.through_fp32(h.device, dtype):
        return _linear(h, up, up_bias, dtype)
    out = _native.scratch("bottleneck", h.shape[0], up.shape[0], dtype)
    weight = up.to(dtype).t()
    if up_bias is None:
        return torch.mm(h, weight, out=out)
    return torch.addmm(up_bias.to(dtype), h, weight, out=out)


def _product(dy: Tensor, weight: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
    """factor dy W in ``dtype``; the result is thin."""
    if _gemm.through_fp32(dy.device, dtype):
        return (_gemm.linear_backward_fp32(dy, weight) * factor).to(dtype)
    product = torch.mm(dy, weight.to(dtype))
    return product if factor == 1.0 else product.mul_(factor)


def _input_gradient(dz: Tensor, down: Tensor, addend: Tensor | None, dtype: torch.dtype) -> Tensor:
    """addend + dz W."""
    if _gemm.through_fp32(dz.device, dtype):
        product = _gemm.linear_backward_fp32(dz, down)
        return (product if addend is None else product.add_(addend)).to(
            dtype if addend is None else addend.dtype, copy=True
        )
    if addend is None:
        return torch.mm(dz, down.to(dtype))
    if addend.dtype == dtype:
        return torch.addmm(addend, dz, down.to(dtype))
    return addend + torch.mm(dz, down.to(dtype))

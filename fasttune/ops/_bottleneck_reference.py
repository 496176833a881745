"""bottleneck in plain torch: reads like the maths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttune.ops import _dropout
from fasttune.ops._activations import ACTIVATIONS
from fasttune.ops._arguments import accumulator


def forward(
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
    wide = accumulator(dtype)
    z = _linear(x, down, down_bias, dtype).to(dtype)
    h = _activate(z, activation, wide).to(dtype)
    u = _linear(h, up, up_bias, dtype)
    keep = _dropout.keep_mask(seed, threshold, *u.shape, branch=0, device=x.device)
    y = u * (factor * _dropout.keep_scale(threshold)) * keep
    if scale is not None:
        y = y * scale.to(wide)
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(out_dtype), z


def backward(
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
    wide = accumulator(dtype)
    need_x, need_down, need_down_bias, need_up, need_up_bias, need_scale = needs
    keep = _dropout.keep_mask(seed, threshold, *dy.shape, branch=0, device=dy.device)
    dropped = dy.to(wide) * keep * (factor * _dropout.keep_scale(threshold))
    h = _activate(z, activation, wide).to(dtype).to(wide)
    du = dropped if scale is None else dropped * scale.to(wide)
    dh = du @ up.to(dtype).to(wide)
    dz = dh if activation == "identity" else dh * ACTIVATIONS[activation].slope(z.to(wide))
    grads = []
    if need_x:
        dx = dz @ down.to(dtype).to(wide)
        grads.append((dx + dy.to(wide) if residual_is_x else dx).to(x.dtype))
    if need_down:
        grads.append((dz.t() @ x.to(dtype).to(wide)).to(down.dtype))
    if need_down_bias:
        assert down_bias is not None
        grads.append(dz.sum(0).to(down_bias.dtype))
    if need_up:
        grads.append((du.t() @ h).to(up.dtype))
    if need_up_bias:
        assert up_bias is not None
        grads.append(du.sum(0).to(up_bias.dtype))
    if need_scale:
        assert scale is not None
        u = _linear(h, up, up_bias, dtype)
        grads.append((dropped * u).sum(0) if scale.numel() > 1 else (dropped * u).sum().view(1))
    return grads


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    wide = accumulator(dtype)
    y = x.to(dtype).to(wide) @ weight.to(dtype).to(wide).t()
    return y if bias is None else y + bias.to(dtype).to(wide)


def _activate(z: Tensor, activation: str, wide: torch.dtype) -> Tensor:
    z = z.to(wide)
    return z if activation == "identity" else ACTIVATIONS[activation].value(z)

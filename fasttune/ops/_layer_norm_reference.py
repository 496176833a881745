"""layer_norm in plain torch: the ground truth, and the portable path. Reads like the maths."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops._arguments import accumulator


def forward(
    x: Tensor,  # [M, H]
    weight: Tensor | None,  # [H]
    bias: Tensor | None,  # [H]
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulator(x.dtype)
    scale = None if weight is None else weight_offset + weight.to(wide)
    shift = None if bias is None else bias.to(wide)
    # What torch.nn.functional.layer_norm computes, with its statistics [M, 1].
    y, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], scale, shift, eps)
    return y.to(out_dtype), mean.squeeze(-1), rstd.squeeze(-1)


def add_forward(
    x: Tensor,  # [M, H]
    residual: Tensor,  # [M, H]
    weight: Tensor | None,  # [H]
    bias: Tensor | None,  # [H]
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = accumulator(x.dtype)
    s = (x.to(wide) + residual.to(wide)).to(x.dtype)
    y, mean, rstd = forward(s, weight, bias, eps, weight_offset, out_dtype)
    return y, s, mean, rstd


def backward(
    dy: Tensor,  # [M, H]
    x: Tensor,  # [M, H]
    weight: Tensor | None,  # [H]
    mean: Tensor,  # [M]
    rstd: Tensor,  # [M]
    addend: Tensor | None,  # [M, H]
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> list[Tensor]:
    wide = rstd.dtype
    grads = []
    n = (x.to(wide) - mean[:, None]) * rstd[:, None]
    if need_dx:
        g = dy.to(wide)
        if weight is not None:
            g = g * (weight_offset + weight.to(wide))
        g_mean = g.mean(-1, keepdim=True)
        dx = rstd[:, None] * (g - g_mean - n * (g * n).mean(-1, keepdim=True))
        if addend is not None:
            dx = dx + addend.to(wide)
        grads.append(dx.to(x.dtype))
    if need_dweight:
        grads.append((dy.to(wide) * n).sum(0))
    if need_dbias:
        grads.append(dy.to(wide).sum(0))
    return grads

"""rms_norm in plain torch: the ground truth, and the portable path. Reads like the maths."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops._arguments import accumulator


def forward(
    x: Tensor,  # [M, H]
    weight: Tensor | None,  # [H]
    eps: float,
    weight_offset: float,
    round_first: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    wide = x.to(accumulator(x.dtype))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = wide * rstd
    if round_first:
        y = y.to(x.dtype)
    if weight is not None:
        y = y * _scale(weight, weight_offset)
    return y.to(out_dtype), rstd.squeeze(-1)


def add_forward(
    x: Tensor,  # [M, H]
    residual: Tensor,  # [M, H]
    weight: Tensor | None,  # [H]
    eps: float,
    weight_offset: float,
    round_first: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulator(x.dtype)
    s = (x.to(wide) + residual.to(wide)).to(x.dtype)
    y, rstd = forward(s, weight, eps, weight_offset, round_first, out_dtype)
    return y, s, rstd


def backward(
    dy: Tensor,  # [M, H]
    x: Tensor,  # [M, H]
    weight: Tensor | None,  # [H]
    rstd: Tensor,  # [M]
    addend: Tensor | None,  # [M, H]
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
) -> list[Tensor]:
    wide = rstd.dtype
    grads = []
    n = x.to(wide) * rstd[:, None]
    if need_dx:
        g = dy.to(wide)
        if weight is not None:
            g = g * _scale(weight, weight_offset)
        dx = rstd[:, None] * (g - n * (g * n).mean(-1, keepdim=True))
        if addend is not None:
            dx = dx + addend.to(wide)
        grads.append(dx.to(x.dtype))
    if need_dweight:
        grads.append((dy.to(wide) * n).sum(0))
    return grads


def _scale(weight: Tensor, weight_offset: float) -> Tensor:
    return weight_offset + weight.to(accumulator(weight.dtype))

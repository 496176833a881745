"""dora_linear in plain torch: the ground truth, and the portable path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttune.ops import _dropout, _gemm
from fasttune.ops._arguments import accumulator


def weight_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The norms [N] of the rows of W + scaling B A in fp32, or fp64; no gradient."""
    with torch.no_grad():
        wide = accumulator(weight.dtype)
        wide_a, wide_b = a.to(wide), b.to(wide)
        step = _gemm.block_rows(weight.shape[1]) if weight.is_cpu else max(weight.shape[0], 1)
        gram = wide_a @ wide_a.t()
        parts = []
        for start in range(0, weight.shape[0], step):
            rows, up = weight[start : start + step].to(wide), wide_b[start : start + step]
            cross = ((rows @ wide_a.t()) * up).sum(1)
            square = rows.square().sum(1) + 2 * scaling * cross
            parts.append(square + scaling**2 * ((up @ gram) * up).sum(1))
        squares = torch.cat(parts) if parts else weight.new_zeros(0, dtype=wide)
        return squares.clamp_(min=0).sqrt_()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    threshold: int,
    dtype: torch.dtype,
    base_dtype: torch.dtype,
    need_base: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = accumulator(dtype)
    own_norm = weight.new_empty(0, dtype=accumulator(weight.dtype))
    if norm is None:
        own_norm = weight_norm(weight, a, b, scaling)
    g = magnitude.to(wide) / (own_norm if norm is None else norm)
    keep = _dropout.keep_mask(seed, threshold, x.shape[0], x.shape[1], branch=0, device=x.device)
    scale, matrix = _dropout.keep_scale(threshold), weight.to(dtype).to(wide).t()
    t = (x.to(wide) * keep) @ a.to(wide).t() * (scaling * scale)
    base = (x.to(dtype).to(wide) * keep) @ matrix
    y = t @ (g[:, None] * b.to(wide)).t()
    y = y + ((g - 1) * scale if threshold else g) * base
    if threshold:
        y = y + x.to(dtype).to(wide) @ matrix
    if bias is not None:
        y = y + bias.to(wide)
    kept = base.to(base_dtype) if need_base else x.new_empty(0, dtype=base_dtype)
    return y.to(dtype), t, kept, own_norm


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    t: Tensor | None,
    base: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    threshold: int,
    x_dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor]:
    wide = accumulator(dy.dtype)
    wide_dy, matrix = dy.to(wide), weight.to(dy.dtype).to(wide)
    g, scale = magnitude.to(wide) / norm, _dropout.keep_scale(threshold)
    rows, columns = dy.shape[0], weight.shape[1]
    keep = _dropout.keep_mask(seed, threshold, rows, columns, branch=0, device=dy.device)
    through_base = wide_dy * ((g - 1) * scale if threshold else g)
    d = wide_dy @ (g[:, None] * b.to(wide)) * (scaling * scale)
    grads: list[Tensor | None] = [None] * 6
    if needs[0]:
        dx = keep * (through_base @ matrix + d @ a.to(wide))
        grads[0] = (dx + wide_dy @ matrix if threshold else dx).to(x_dtype)
    if needs[1] and x is not None:
        wide_x = x.to(dy.dtype).to(wide)
        dw = through_base.t() @ (wide_x * keep)
        grads[1] = (dw + wide_dy.t() @ wide_x if threshold else dw).to(weight.dtype)
    if needs[2]:
        grads[2] = wide_dy.sum(0)
    if needs[3] and x is not None:
        grads[3] = (d.t() @ (x.to(wide) * keep)).to(a.dtype)
    if t is not None:
        db = wide_dy.t() @ t
        if needs[4]:
            grads[4] = (g[:, None] * db).to(b.dtype)
        if needs[5] and base is not None:
            dg = (wide_dy * base.to(wide)).sum(0) * scale + (b.to(wide) * db).sum(1)
            grads[5] = (dg / norm).to(magnitude.dtype)
    return [grad for grad, flag in zip(grads, needs, strict=True) if flag and grad is not None]

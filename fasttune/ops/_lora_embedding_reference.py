"""lora_embedding in plain torch: the ground truth, and the portable path. Reads like the maths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttune.ops._arguments import accumulator


def _scale(scaling: float, scaling_tensor: Tensor | None) -> float | Tensor:
    return scaling if scaling_tensor is None else scaling * scaling_tensor


def forward(
    base: Tensor,
    ids: Tensor,
    scaling_tensors: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
) -> tuple[Tensor, list[Tensor]]:
    wide = accumulator(base.dtype)
    y, ts = base.to(wide), []
    for j, (down, up) in enumerate(zip(a, b, strict=True)):
        t = _scale(scalings[j], scaling_tensors[j]) * down.to(wide)[:, ids].t()
        y = y + t @ up.to(wide).t()
        ts.append(t.contiguous())
    return y.to(base.dtype, copy=True), ts


def backward(
    dy: Tensor,
    ids: Tensor,
    scaling_tensors: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ts: Sequence[Tensor | None],
    scalings: Sequence[float],
    padding_idx: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    wide = accumulator(dy.dtype)
    das, dbs = [], []
    for j, (down, up, t) in enumerate(zip(a, b, ts, strict=True)):
        if needs[j]:
            d = _scale(scalings[j], scaling_tensors[j]) * (dy.to(wide) @ up.to(wide))
            d = d * (ids != padding_idx).unsqueeze(1)
            da = torch.zeros(down.shape, dtype=wide, device=dy.device).index_add(1, ids, d.t())
            das.append(da.to(down.dtype))
        if needs[len(a) + j] and t is not None:
            dbs.append((dy.to(wide).t() @ t).to(up.dtype))
    return [*das, *dbs]

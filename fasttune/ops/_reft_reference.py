"""reft in plain torch: reads like the maths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttune.ops import _dropout
from fasttune.ops._activations import ACTIVATIONS
from fasttune.ops._arguments import accumulator


def edited(
    x: Tensor,  # [P, H]
    rotation: Tensor,
    source: Tensor,
    bias: Tensor | None,
    difference: bool,
    activation: str,
    threshold: int,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The edited rows [P, H], z and d [P, R], all in the accumulator's dtype."""
    wide = accumulator(x.dtype)
    x, rotation = x.to(wide), rotation.to(wide)
    z = x @ source.to(wide).t()
    if bias is not None:
        z = z + bias.to(wide)
    d = z if activation == "identity" else ACTIVATIONS[activation].value(z)
    if difference:
        d = d - x @ rotation.t()
    return _dropped(x + d @ rotation, threshold, seed), z, d


def forward(
    h: Tensor,
    rows: Tensor | None,
    rotation: Tensor,
    source: Tensor,
    bias: Tensor | None,
    difference: bool,
    activation: str,
    threshold: int,
    seed: Tensor | None,
    y: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    x = _gathered(h, rows)
    rest = (bias, difference, activation, threshold, seed)
    values, z, d = edited(x, rotation, source, *rest)
    if rows is None:
        y.copy_(values)
        return h.new_empty(0, h.shape[1]), z, d.clone() if d is z else d
    there = (rows >= 0).unsqueeze(1)
    _scatter(y, rows, values)
    return x, torch.where(there, z, 0.0), torch.where(there, d, 0.0)


def backward(
    dy: Tensor,
    x: Tensor,
    rows: Tensor | None,
    rotation: Tensor,
    source: Tensor,
    z: Tensor,
    d: Tensor,
    difference: bool,
    activation: str,
    threshold: int,
    seed: Tensor | None,
    dh: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulator(dy.dtype)
    g = _dropped(_gathered(dy, rows).to(wide), threshold, seed)
    x = x.to(wide)
    dd = g @ rotation.to(wide).t()
    dz = dd if activation == "identity" else dd * ACTIVATIONS[activation].slope(z)
    if dh is not None:
        dx = g + dz @ source.to(wide)
        if difference:
            dx = dx - dd @ rotation.to(wide)
        _scatter(dh, rows, dx)
    need_rotation, need_source, need_bias = needs
    drotation, dsource, dbias = (dy.new_empty(0) for _ in range(3))  # what is not needed
    if need_rotation:
        drotation = d.t() @ g
        if difference:
            drotation = drotation - dd.t() @ x
        drotation = drotation.to(rotation.dtype)
    if need_source:
        dsource = (dz.t() @ x).to(source.dtype)
    if need_bias:
        dbias = dz.sum(0)
    return drotation, dsource, dbias


def _gathered(h: Tensor, rows: Tensor | None) -> Tensor:
    """The listed rows; zeros where the list names none."""
    if rows is None:
        return h
    there = (rows >= 0).unsqueeze(1)
    return torch.where(there, h.index_select(0, rows.clamp(min=0)), 0.0)


def _scatter(y: Tensor, rows: Tensor | None, values: Tensor) -> None:
    if rows is None:
        y.copy_(values)
    else:
        y.index_copy_(0, rows[rows >= 0], values[rows >= 0].to(y.dtype))


def _dropped(x: Tensor, threshold: int, seed: Tensor | None) -> Tensor:
    if threshold == 0:
        return x
    keep = _dropout.keep_mask(seed, threshold, *x.shape, branch=0, device=x.device)
    return x * keep.to(x.dtype) * _dropout.keep_scale(threshold)

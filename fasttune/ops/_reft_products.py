"""reft in terms of a backend's primitives: one kernel over the listed rows each way, and the sums
over the rows that the parameters' gradients are."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fasttune.ops import _dropout

_LARGEST_RANK = 128  # of a sum over rows that every backend takes in one go


def forward_with(
    prims: ModuleType,
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
    x, z, d = prims.reft_forward(
        h, rows, rotation, source, bias, difference=difference, activation=activation,
        scale=_dropout.keep_scale(threshold), seed=seed, threshold=threshold, y=y,
    )  # fmt: skip
    return h.new_empty(0, h.shape[1]) if x is None else x, z, d


def backward_with(
    prims: ModuleType,
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
    scale = _dropout.keep_scale(threshold)
    g, dz, dd = prims.reft_backward(
        dy, rows, rotation, source, z, difference=difference, activation=activation, scale=scale,
        seed=seed, threshold=threshold, dh=dh,
    )  # fmt: skip
    g = dy if g is None else g
    need_rotation, need_source, need_bias = needs
    drotation, dsource, dbias = (dy.new_empty(0) for _ in range(3))  # what is not needed
    of_x = []  # what is multiplied by x, in one pass over it
    if need_source:
        of_x.append(dz)
    if need_rotation and difference:
        of_x.append(dd)
    products: list[Tensor] = []
    if len(of_x) == 2 and 2 * rotation.shape[0] <= _LARGEST_RANK:
        both = _outer(prims, torch.cat(of_x, dim=1), x, torch.float32)
        first, second = both.split(rotation.shape[0])
        products = [first.clone(), second]  # a gradient is not to keep the memory of both
    else:
        products = [_outer(prims, t, x, torch.float32) for t in of_x]
    if need_rotation:
        scaled = d if scale == 1.0 else d * scale
        drotation = _outer(prims, scaled, g, torch.float32, seed, threshold)
        if difference:
            drotation -= products[-1]
        drotation = drotation.to(rotation.dtype)
    if need_source:
        dsource = products[0].to(source.dtype)
    if need_bias:
        dbias = prims.column_sum(dz)
    return drotation, dsource, dbias


def _outer(
    prims: ModuleType,
    t: Tensor,  # [P, R] fp32
    x: Tensor,  # [P, H]
    dtype: torch.dtype,
    seed: Tensor | None = None,
    threshold: int = 0,
) -> Tensor:
    """t^T (keep * x) [R, H] in ``dtype``, in a fixed order."""
    shaped = x.new_empty(t.shape[1], x.shape[1], dtype=dtype)
    _, product = prims.lora_down_backward(
        t, shaped, x, seed=seed, threshold=threshold, branch=0, dx_dtype=x.dtype, need_dx=False,
        need_da=True,
    )  # fmt: skip
    result: Tensor = product
    return result

"""lora_segmented in plain torch: the ground truth, and the portable path. Reads like the maths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from fasttune.ops import _dropout
from fasttune.ops._arguments import accumulator
from fasttune.ops._lora_linear_products import Needs
from fasttune.ops._lora_segmented_plan import triples


def _places(segment: tuple[int, int, int], order: Tensor | None, device: torch.device) -> Tensor:
    """The rows of the batch in a segment."""
    start, stop, _ = segment
    return torch.arange(start, stop, device=device) if order is None else order[start:stop]


def _scale(scaling: float, scale_tensor: Tensor | None, dtype: torch.dtype) -> float | Tensor:
    return scaling if scale_tensor is None else scaling * scale_tensor.to(dtype)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    lora_biases: Sequence[Tensor | None],
    scaling_tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    thresholds: Sequence[int],
    ids: Sequence[int],
    segments: Sequence[int],
    order: Tensor | None,
    seed: Tensor | None,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    wide = accumulator(compute_dtype)
    base = x.to(compute_dtype).to(wide), weight.to(compute_dtype).to(wide)
    y = linear(*base, None if bias is None else bias.to(wide))
    ts = []
    for segment in triples(segments):
        start, stop, j = segment
        rows = _places(segment, order, x.device)
        keep = _dropout.keep_mask(
            seed, thresholds[j], stop - start, x.shape[1], branch=ids[j], row_offset=start
        )
        scale = _scale(scalings[j], scaling_tensors[j], wide)
        t = (x[rows].to(wide) * keep) @ a[j].to(wide).t()
        t = t * (_dropout.keep_scale(thresholds[j]) * scale)
        addend = t @ b[j].to(wide).t()
        lora_bias = lora_biases[j]
        if lora_bias is not None:
            addend = addend + scale * lora_bias.to(wide)
        y = y.index_add(0, rows, addend)
        ts.append(t)
    return y.to(compute_dtype), ts


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ts: Sequence[Tensor],
    scaling_tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    thresholds: Sequence[int],
    ids: Sequence[int],
    segments: Sequence[int],
    order: Tensor | None,
    seed: Tensor | None,
    x_dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor]:
    need = Needs.unpack(needs, 1, len(a))
    wide, c = accumulator(dy.dtype), dy.dtype
    dy = dy.to(wide)
    dx = dw = None
    if need.x and weight is not None:
        dx = dy @ weight.to(c).to(wide)
    if need.w[0] and x is not None and weight is not None:
        dw = (dy.t() @ x.to(c).to(wide)).to(weight.dtype)
    das = [torch.zeros_like(factor, dtype=wide) for factor in a]
    dbs = [torch.zeros_like(factor, dtype=wide) for factor in b]
    dlora_biases = [dy.new_zeros(factor.shape[0]) for factor in b]
    for segment, t in zip(triples(segments), ts, strict=True):
        start, stop, j = segment
        rows = _places(segment, order, dy.device)
        keep = _dropout.keep_mask(
            *(seed, thresholds[j], stop - start, a[j].shape[1]),
            branch=ids[j],
            row_offset=start,
            device=dy.device,
        )
        scale = _scale(scalings[j], scaling_tensors[j], wide)
        own = dy[rows]
        d = own @ b[j].to(wide) * (_dropout.keep_scale(thresholds[j]) * scale)
        if dx is not None:
            dx = dx.index_add(0, rows, keep * (d @ a[j].to(wide)))
        if need.a[j] and x is not None:
            das[j] += d.t() @ (x[rows].to(wide) * keep)
        if need.b[j]:
            dbs[j] += own.t() @ t
        dlora_biases[j] += own.sum(0) * scale
    das = [grad.to(factor.dtype) for grad, factor in zip(das, a, strict=True)]
    dbs = [grad.to(factor.dtype) for grad, factor in zip(dbs, b, strict=True)]
    dx = None if dx is None else dx.to(x_dtype)
    wanted = [dx, dw, dy.sum(0), *das, *dbs, *dlora_biases]
    return [grad for grad, flag in zip(wanted, needs, strict=True) if flag and grad is not None]

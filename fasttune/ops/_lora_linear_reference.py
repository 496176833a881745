"""lora_linear in plain torch: the ground truth, and the portable path. Reads like the maths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttune.ops import _dropout
from fasttune.ops._arguments import accumulator
from fasttune.ops._lora_linear_products import Needs, bias_gradients, first_given, ranges


def forward(
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    lora_biases: Sequence[Tensor | None],
    scaling_tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    thresholds: Sequence[int],
    counts: Sequence[int],
    seeds: Sequence[Tensor | None],
    compute_dtype: torch.dtype,
    bases: Sequence[Tensor | None],
    streams: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    wide = accumulator(compute_dtype)
    ys, ts = [], []
    for i, branches in enumerate(ranges(counts)):
        weight, base, bias = weights[i], bases[i], biases[i]
        if weight is not None:
            y = x.to(compute_dtype).to(wide) @ weight.to(compute_dtype).to(wide).t()
        else:
            assert base is not None
            y = base.to(wide)
        if bias is not None:
            y = y + bias.to(wide)
        for j in branches:
            keep = _dropout.keep_mask(
                seeds[i], thresholds[j], x.shape[0], x.shape[1], branch=streams[j]
            )
            scale: float | Tensor = scalings[j]
            scale_tensor = scaling_tensors[j]
            if scale_tensor is not None:
                scale = scale * scale_tensor.to(wide)
            t = (
                (x.to(wide) * keep)
                @ a[j].to(wide).t()
                * (_dropout.keep_scale(thresholds[j]) * scale)
            )
            y = y + t @ b[j].to(wide).t()
            lora_bias = lora_biases[j]
            if lora_bias is not None:
                y = y + scale * lora_bias.to(wide)
            ts.append(t)
        ys.append(y.to(compute_dtype if base is None else base.dtype))
    return ys, ts


def backward(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    weights: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ts: Sequence[Tensor],
    scaling_tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    thresholds: Sequence[int],
    counts: Sequence[int],
    seeds: Sequence[Tensor | None],
    x_dtype: torch.dtype,
    needs: Sequence[bool],
    streams: Sequence[int],
) -> list[Tensor]:
    need = Needs.unpack(needs, len(weights), len(a))
    first = first_given(dys)
    wide = accumulator(first.dtype)
    dx = first.new_zeros((), dtype=wide)
    das: list[Tensor | None] = [None] * len(a)
    dbs: list[Tensor | None] = [None] * len(a)
    dws: list[Tensor | None] = [None] * len(weights)
    for i, branches in enumerate(ranges(counts)):
        given, weight = dys[i], weights[i]
        if given is None:
            continue
        dy = given.to(wide)
        if need.x and weight is not None:
            dx = dx + dy @ weight.to(given.dtype).to(wide)
        if need.w[i] and weight is not None and x is not None:
            dws[i] = (dy.t() @ x.to(given.dtype).to(wide)).to(weight.dtype)
        for j in branches:
            keep = _dropout.keep_mask(
                seeds[i], thresholds[j], dy.shape[0], a[j].shape[1], branch=streams[j],
                device=dy.device,
            )  # fmt: skip
            scale: float | Tensor = scalings[j] * _dropout.keep_scale(thresholds[j])
            scale_tensor = scaling_tensors[j]
            if scale_tensor is not None:
                scale = scale * scale_tensor.to(wide)
            d = dy @ b[j].to(wide) * scale
            if need.x:
                dx = dx + keep * (d @ a[j].to(wide))
            if need.a[j] and x is not None:
                das[j] = (d.t() @ (x.to(wide) * keep)).to(a[j].dtype)
            if need.b[j]:
                dbs[j] = (dy.t() @ ts[j]).to(b[j].dtype)
    dbiases, dlora_biases = bias_gradients(dys, scaling_tensors, scalings, counts, need)
    wanted = [dx.to(x_dtype), *dws, *dbiases, *das, *dbs, *dlora_biases]
    return [grad for grad, flag in zip(wanted, needs, strict=True) if flag and grad is not None]

"""Forward and backward of lora_linear in terms of the primitives of a backend (docs/design.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fasttune import _native
from fasttune.ops import _dropout, _gemm
from fasttune.ops._arguments import accumulator


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    x: bool
    w: Sequence[bool]
    bias: Sequence[bool]
    a: Sequence[bool]
    b: Sequence[bool]
    lora_bias: Sequence[bool]

    @staticmethod
    def unpack(flags: Sequence[bool], projections: int, branches: int) -> Needs:
        sizes = (projections, projections, branches, branches, branches)
        parts, at = [], 1
        for size in sizes:
            parts.append(flags[at : at + size])
            at += size
        return Needs(flags[0], *parts)

    def of_outputs(self, given: Sequence[bool], counts: Sequence[int]) -> list[bool]:
        """The flags, without the parameters of projections whose output got no gradient."""
        owners = [i for i, count in enumerate(counts) for _ in range(count)]
        of_projections = [
            flag and alive
            for flags in (self.w, self.bias)
            for flag, alive in zip(flags, given, strict=True)
        ]
        of_branches = [
            flag and given[owner]
            for flags in (self.a, self.b, self.lora_bias)
            for flag, owner in zip(flags, owners, strict=True)
        ]
        return [self.x, *of_projections, *of_branches]


def ranges(counts: Sequence[int]) -> list[range]:
    """The branch indices of each projection."""
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + count)
    return [range(start, end) for start, end in pairwise(ends)]


def branch_scale(scaling: float, threshold: int) -> float:
    return scaling * _dropout.keep_scale(threshold)


def total_bias(
    bias: Tensor | None,
    lora_biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    scaling_tensors: Sequence[Tensor | None],
) -> Tensor | None:
    total = bias
    for lora_bias, scaling, scaling_tensor in zip(
        lora_biases, scalings, scaling_tensors, strict=True
    ):
        if lora_bias is None:
            continue
        term = lora_bias.to(accumulator(lora_bias.dtype)) * scaling
        if scaling_tensor is not None:
            term = term * scaling_tensor
        total = term if total is None else total.to(term.dtype) + term
    return total


def _concatenate(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.to(torch.float32) for part in parts], dim=1)


def forward_with(prims: ModuleType, *args: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The forward in terms of the primitives of a backend."""
    (
        x,
        weights,
        biases,
        a,
        b,
        lora_biases,
        scaling_tensors,
        scalings,
        thresholds,
        counts,
        seeds,
        dtype,
        bases,
        streams,
    ) = args
    ys, ts = [], []
    for i, branches in enumerate(ranges(counts)):
        own = [
            prims.lora_down(
                x,
                a[j],
                branch_scale(scalings[j], thresholds[j]),
                scaling_tensors[j],
                seed=seeds[i],
                threshold=thresholds[j],
                branch=streams[j],
            )
            for j in branches
        ]
        ts += own
        bias = total_bias(
            biases[i],
            [lora_biases[j] for j in branches],
            [scalings[j] for j in branches],
            [scaling_tensors[j] for j in branches],
        )
        bs = [b[j] for j in branches]
        if bases[i] is None:
            ys.append(_add_base(prims, x, weights[i], bias, own, bs, dtype))
        else:
            sums = {"out_dtype": bases[i].dtype, "addend": bases[i]}
            ys.append(prims.lora_up(_concatenate(own), _concatenate(bs), bias, **sums))
    return ys, ts


def _add_base(
    prims: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ts: list[Tensor],
    bs: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """x W^T + bias + sum_j t_j B_j^T in ``dtype``."""
    if not ts:
        return torch.nn.functional.linear(
            x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        )
    t, b = _concatenate(ts), _concatenate(bs)
    if prims is _native and _gemm.through_fp32(x.device, dtype):
        base = _gemm.linear_fp32(x, weight)
        return _native.lora_up(t, b, bias, out_dtype=dtype, addend=base)
    y: Tensor = prims.lora_up(t, b, bias, out_dtype=dtype)
    return y.addmm_(x.to(dtype), weight.to(dtype).t())


def backward_with(prims: ModuleType, *args: Any) -> list[Tensor]:
    """The backward in terms of the primitives of a backend; `needs` states the order of
    gradients.
    """
    (
        dys,
        x,
        weights,
        a,
        b,
        ts,
        scaling_tensors,
        scalings,
        thresholds,
        counts,
        seeds,
        x_dtype,
        needs,
        streams,
    ) = args
    need = Needs.unpack(needs, len(weights), len(a))
    dbs: list[Tensor | None] = [None] * len(a)
    ds: dict[int, Tensor] = {}
    for i, branches in enumerate(ranges(counts)):
        if dys[i] is None:
            continue
        for j in branches:
            d, dbs[j] = prims.lora_up_backward(
                dys[i],
                ts[j],
                b[j],
                branch_scale(scalings[j], thresholds[j]),
                scaling_tensors[j],
                need_d=need.x or need.a[j],
                need_db=need.b[j],
            )
            if d is not None:
                ds[j] = d
    dws = [
        _gemm.weight_gradient(dy, x, weight.dtype) if flag and x is not None else None
        for dy, weight, flag in zip(dys, weights, need.w, strict=True)
    ]
    dbiases, dlora_biases = bias_gradients(dys, scaling_tensors, scalings, counts, need)
    owners = [i for i, branches in enumerate(ranges(counts)) for _ in branches]
    draws = [
        {"seed": seeds[i], "threshold": thresholds[j], "branch": streams[j]}
        for j, i in enumerate(owners)
    ]
    dx, das = _input_side(prims, dys, x, weights, a, ds, need, draws, dtype=x_dtype)
    wanted = [dx, *dws, *dbiases, *das, *dbs, *dlora_biases]
    return [grad for grad, flag in zip(wanted, needs, strict=True) if flag and grad is not None]


def _input_side(
    prims: ModuleType,
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    weights: Sequence[Tensor | None],
    a: Sequence[Tensor],
    ds: dict[int, Tensor],
    need: Needs,
    draws: Sequence[dict[str, Any]],
    *,
    dtype: torch.dtype,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx and every dA.

    Through fp32, the sum travels in an fp32 addend and only the last branch rounds. With vendor
    products the branches are written first and addmm adds dy W on top, which hides a read of dx.
    """
    products = _with_weights(dys, weights)
    first = first_given(dys)
    fp32 = prims is _native and _gemm.through_fp32(first.device, first.dtype)
    total: Tensor | None = None
    if need.x and fp32:
        for dy, weight in products:
            product = _gemm.linear_backward_fp32(dy, weight)
            if len(products) > 1:  # the product lies in a scratch buffer that the next one reuses
                product = product.clone() if total is None else total.add_(product)
            total = product
    das: list[Tensor | None] = [None] * len(a)
    for position, (j, d) in enumerate(ds.items(), start=1):
        rounds = position == len(ds) or not fp32
        part, das[j] = prims.lora_down_backward(
            d,
            a[j],
            x,
            **draws[j],
            dx_dtype=dtype if rounds else torch.float32,
            need_dx=need.x,
            need_da=need.a[j],
            **({"addend": total} if fp32 else {}),
        )
        if part is not None:
            total = part if fp32 or total is None else total.add_(part)
    if not need.x:
        return None, das
    if fp32:
        assert total is not None
        return (total if ds else total.to(dtype, copy=True)), das
    for dy, weight in products:
        total = add_product(total, dy, weight.to(dy.dtype), dtype)
    return total, das


def first_given(dys: Sequence[Tensor | None]) -> Tensor:
    """The gradient of the first output that got one; at least one did."""
    return next(dy for dy in dys if dy is not None)


def _with_weights(
    dys: Sequence[Tensor | None], weights: Sequence[Tensor | None]
) -> list[tuple[Tensor, Tensor]]:
    """The projections with a gradient whose base product is ours."""
    pairs = zip(dys, weights, strict=True)
    return [(dy, w) for dy, w in pairs if dy is not None and w is not None]


def add_product(total: Tensor | None, dy: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if total is None:
        return torch.mm(dy, weight).to(dtype)
    if total.dtype == dy.dtype:
        return total.addmm_(dy, weight)
    return total.add_(torch.mm(dy, weight))


def bias_gradients(
    dys: Sequence[Tensor | None],
    scaling_tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    counts: Sequence[int],
    need: Needs,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    dbiases: list[Tensor | None] = [None] * len(dys)
    dlora_biases: list[Tensor | None] = [None] * len(scalings)
    for i, branches in enumerate(ranges(counts)):
        dy = dys[i]
        if dy is None or not (need.bias[i] or any(need.lora_bias[j] for j in branches)):
            continue
        dbiases[i] = column_sum = dy.sum(0, dtype=accumulator(dy.dtype))
        for j in branches:
            scaled, scale = column_sum * scalings[j], scaling_tensors[j]
            dlora_biases[j] = scaled if scale is None else scaled * scale
    return dbiases, dlora_biases

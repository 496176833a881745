"""Forward and backward of lora_linear in terms of the primitives of a backend (docs/design.md)."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fasttune import _native
from fasttune._native import lora_cuda
from fasttune.ops import _dropout, _gemm, _triton
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
        return _unpacked(tuple(flags), projections, branches)

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


@lru_cache(maxsize=256)
def _unpacked(flags: tuple[bool, ...], projections: int, branches: int) -> Needs:
    sizes = (projections, projections, branches, branches, branches)
    parts, at = [], 1
    for size in sizes:
        parts.append(flags[at : at + size])
        at += size
    return Needs(flags[0], *parts)


def ranges(counts: Sequence[int]) -> tuple[range, ...]:
    """The branch indices of each projection."""
    return _ranges(tuple(counts))


@lru_cache(maxsize=256)
def _ranges(counts: tuple[int, ...]) -> tuple[range, ...]:
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + count)
    return tuple(range(start, end) for start, end in pairwise(ends))


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


def segment_biases(
    bias: Tensor | None,
    lora_biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    scaling_tensors: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """bias + s_j lora_bias_j of every branch j."""
    facts = zip(lora_biases, scalings, scaling_tensors, strict=True)
    return [total_bias(bias, [each], [scaling], [tensor]) for each, scaling, tensor in facts]


def _concatenate(parts: list[Tensor]) -> Tensor | None:
    """The columns of all parts, None if there are none."""
    if len(parts) < 2:
        return parts[0] if parts else None
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
    owners = _owners(counts)
    draws = _draws(owners, seeds, thresholds, streams)
    scales = [branch_scale(*pair) for pair in zip(scalings, thresholds, strict=True)]
    projections = ranges(counts)
    through_fp32 = prims is _native and _gemm.through_fp32(x.device, dtype)
    products, layers = {}, {}
    if prims is _native and dtype == torch.bfloat16 and _native.has_base_product():
        left = x.to(dtype)
        with_branches = {i: w for i, w in enumerate(weights) if w is not None and counts[i]}
        products = _own_products({i: (left, w.t()) for i, w in with_branches.items()})
        layers = {  # whose t, of x as it came, is made on the way
            branches[0]: i
            for i, branches in enumerate(projections)
            if i in products and left is x and _is_one(a, branches)
        }
    ts = _down(prims, x, a, scales, scaling_tensors, draws, layers)
    totals = biases
    if any(lora_bias is not None for lora_bias in lora_biases):
        totals = [
            total_bias(
                biases[i],
                [lora_biases[j] for j in branches],
                [scalings[j] for j in branches],
                [scaling_tensors[j] for j in branches],
            )
            for i, branches in enumerate(projections)
        ]
    ys: list[Any] = [None] * len(weights)
    for j, i in layers.items():
        ys[i], ts[j] = prims.lora_layer(
            products[i], a[j], b[j], totals[i], scales[j], scaling_tensors[j],
            **draws[j], out_dtype=dtype,
        )  # fmt: skip
    own: Sequence[Tensor | None] = ts
    up: Sequence[Tensor | None] = b
    if any(count != 1 for count in counts):
        own = [_concatenate([ts[j] for j in branches]) for branches in projections]
        up = [_concatenate([b[j] for j in branches]) for branches in projections]
    first = [i for i, t in enumerate(own) if t is not None and bases[i] is None]
    separate = [] if through_fp32 else [i for i in first if i not in products]
    sums = _up(prims, separate, own, up, totals, dtype) if separate else {}
    for i, (t, factor) in enumerate(zip(own, up, strict=True)):
        if ys[i] is not None:
            continue
        if t is None:
            ys[i] = _plain_linear(x, weights[i], totals[i], dtype)
        elif i in products:
            ys[i] = prims.lora_up(t, factor, totals[i], out_dtype=dtype, product=products[i])
        elif i in sums:
            ys[i] = sums[i].addmm_(x.to(dtype), weights[i].to(dtype).t())
        else:
            base = _gemm.linear_fp32(x, weights[i]) if bases[i] is None else bases[i]
            out_dtype = dtype if bases[i] is None else base.dtype
            ys[i] = prims.lora_up(t, factor, totals[i], out_dtype=out_dtype, addend=base)
    return ys, ts


def _is_one(factors: Sequence[Tensor], branches: range) -> bool:
    """True for one branch, of a rank that the C++ kernels sum in one go."""
    return len(branches) == 1 and factors[branches[0]].shape[0] <= _native.MAX_RANK


def _group(prims: ModuleType) -> ModuleType:
    """The kernels that take all branches of a group at once; those of a CPU take one at a time."""
    return prims if prims is lora_cuda else _triton.kernels("lora_group")


def _owners(counts: Sequence[int]) -> list[int]:
    """The projection of each branch."""
    return [i for i, count in enumerate(counts) for _ in range(count)]


def _draws(
    owners: Sequence[int],
    seeds: Sequence[Tensor | None],
    thresholds: Sequence[int],
    streams: Sequence[int],
) -> list[dict[str, Any]]:
    """Where the random bits of each branch come from."""
    return [
        {"seed": seeds[i], "threshold": thresholds[j], "branch": streams[j]}
        for j, i in enumerate(owners)
    ]


def _down(
    prims: ModuleType,
    x: Tensor,
    a: Sequence[Tensor],
    scales: Sequence[float],
    scaling_tensors: Sequence[Tensor | None],
    draws: Sequence[dict[str, Any]],
    left_out: Container[int],
) -> list[Any]:
    """t of every branch, in one pass over x where the backend can; None for those left out."""
    if prims is not _native:
        ts: list[Any] | None = _group(prims).lora_down_group(x, a, scales, scaling_tensors, draws)
        if ts is not None:
            return ts
    return [
        None if j in left_out else prims.lora_down(x, *branch, **draw)
        for j, (*branch, draw) in enumerate(zip(a, scales, scaling_tensors, draws, strict=True))
    ]


def _up(
    prims: ModuleType,
    chosen: Sequence[int],
    ts: Sequence[Tensor | None],
    bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> dict[int, Tensor]:
    """bias + t B^T in ``dtype`` of the chosen projections."""
    if prims is not _native and len(chosen) > 1:
        lists = ([items[i] for i in chosen] for items in (ts, bs, biases))
        ys = _group(prims).lora_up_group(*lists, out_dtype=dtype)
        if ys is not None:
            return dict(zip(chosen, ys, strict=True))
    return {i: prims.lora_up(ts[i], bs[i], biases[i], out_dtype=dtype) for i in chosen}


def _own_products(products: dict[int, tuple[Tensor, Tensor]]) -> dict[int, tuple[Tensor, Tensor]]:
    """Those of the products with base weights, left [M, K] and right [K, N] by projection, that the
    kernel of a branch takes with it.
    """
    return {
        i: (left, right.to(left.dtype))
        for i, (left, right) in products.items()
        if _native.takes_product(left, right, cast=True)
        and not _gemm.through_fp32(left.device, left.dtype)
    }


def _plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.linear(
        x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    )


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
    owners = _owners(counts)
    alive = [j for j, i in enumerate(owners) if dys[i] is not None]
    scales = [branch_scale(*pair) for pair in zip(scalings, thresholds, strict=True)]
    products = _with_weights(dys, weights)
    own = {}
    first = first_given(dys)
    fp32 = prims is _native and _gemm.through_fp32(first.device, first.dtype)
    if prims is _native and need.x and not fp32 and x_dtype in (torch.float32, torch.bfloat16):
        with_branches = {owners[j] for j in alive}
        own = _own_products({i: pair for i, pair in products.items() if i in with_branches})
    layers = {
        j: (b[j], scales[j], scaling_tensors[j])
        for j in alive
        if owners[j] in own and owners[j] not in owners[:j] and b[j].shape[1] <= _native.MAX_RANK
    }
    ds, dbs = _up_backward(
        prims, alive, [dys[i] for i in owners], ts, b, scales, scaling_tensors, need, layers
    )
    dws = [
        _gemm.weight_gradient(dy, x, weight.dtype) if flag and x is not None else None
        for dy, weight, flag in zip(dys, weights, need.w, strict=True)
    ]
    dbiases, dlora_biases = bias_gradients(dys, scaling_tensors, scalings, counts, need)
    draws = _draws(owners, seeds, thresholds, streams)
    dx, das = _input_side(
        prims, fp32, x, products, own, layers, a, ds, need, draws, owners, dtype=x_dtype
    )
    wanted = [dx, *dws, *dbiases, *das, *dbs, *dlora_biases]
    return [grad for grad, flag in zip(wanted, needs, strict=True) if flag and grad is not None]


def _up_backward(
    prims: ModuleType,
    alive: Sequence[int],
    dys: Sequence[Tensor | None],
    ts: Sequence[Tensor | None],
    b: Sequence[Tensor],
    scales: Sequence[float],
    scaling_tensors: Sequence[Tensor | None],
    need: Needs,
    layers: Container[int],
) -> tuple[dict[int, Any], list[Tensor | None]]:
    """d and dB of the branches whose output got a gradient; d is missing where not needed, and None
    of ``layers``.
    """
    dbs: list[Tensor | None] = [None] * len(b)
    both = all((need.x or need.a[j]) and need.b[j] for j in alive)
    if both and len(alive) > 1 and prims is not _native:
        lists = ([items[j] for j in alive] for items in (dys, ts, b, scales, scaling_tensors))
        grouped = _group(prims).lora_up_backward_group(*lists)
        if grouped is not None:
            for j, db in zip(alive, grouped[1], strict=True):
                dbs[j] = db
            return dict(zip(alive, grouped[0], strict=True)), dbs
    ds: dict[int, Any] = {}
    for j in alive:
        wanted = need.x or need.a[j]
        d, dbs[j] = prims.lora_up_backward(
            dys[j],
            ts[j],
            b[j],
            scales[j],
            scaling_tensors[j],
            need_d=wanted and j not in layers,
            need_db=need.b[j],
        )
        if wanted:
            ds[j] = d
    return ds, dbs


def _input_side(
    prims: ModuleType,
    fp32: bool,
    x: Tensor | None,
    products: dict[int, tuple[Tensor, Tensor]],
    own: dict[int, tuple[Tensor, Tensor]],
    layers: dict[int, tuple[Tensor, float, Tensor | None]],
    a: Sequence[Tensor],
    ds: dict[int, Any],
    need: Needs,
    draws: Sequence[dict[str, Any]],
    owners: Sequence[int],
    *,
    dtype: torch.dtype,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx and every dA.

    Through fp32, the sum travels in an fp32 addend and only the last branch rounds. Otherwise the
    branches are written first, in C++ each onto the sum of those before it and, where the kernels
    take it (``own``), with dy W in the same rounding and with d of ``layers`` on the way; addmm
    adds what is left of ``products`` on top, which hides a read of dx.
    """
    total: Tensor | None = None
    if need.x and fp32:
        for dy, weight in products.values():
            base = _gemm.linear_backward_fp32(dy, weight)
            if len(products) > 1:  # the product lies in a scratch buffer that the next one reuses
                base = base.clone() if total is None else total.add_(base)
            total = base
    das: list[Tensor | None] = [None] * len(a)
    grouped = _down_backward_group(prims, x, a, ds, need, draws, dtype)
    if grouped is not None:
        total, parts = grouped
        for j, da in zip(ds, parts, strict=True):
            das[j] = da
    for position, (j, d) in enumerate(ds.items() if grouped is None else (), start=1):
        rounds = position == len(ds) or not fp32
        extra: dict[str, Any] = {}
        if prims is _native:
            takes = owners[j] in own and products.pop(owners[j], None) is not None
            product = own[owners[j]] if takes else None
            extra = {"addend": total, "product": product, "up": layers.get(j)}
        part, das[j] = prims.lora_down_backward(
            d,
            a[j],
            x,
            **draws[j],
            dx_dtype=dtype if rounds else torch.float32,
            need_dx=need.x,
            need_da=need.a[j],
            **extra,
        )
        if part is not None:
            total = part if prims is _native or total is None else total.add_(part)
    if not need.x:
        return None, das
    if fp32:
        assert total is not None
        return (total if ds else total.to(dtype, copy=True)), das
    for dy, weight in products.values():
        total = add_product(total, dy, weight.to(dy.dtype), dtype)
    return total, das


def _down_backward_group(
    prims: ModuleType,
    x: Tensor | None,
    a: Sequence[Tensor],
    ds: dict[int, Any],
    need: Needs,
    draws: Sequence[dict[str, Any]],
    dtype: torch.dtype,
) -> tuple[Tensor | None, Sequence[Tensor | None]] | None:
    """dx0 and every dA in one pass over x, None where the backend cannot."""
    wanted = {need.a[j] for j in ds}
    if len(ds) < 2 or len(wanted) != 1 or prims is _native:
        return None
    need_da = wanted.pop()
    grouped = _group(prims).lora_down_backward_group(
        list(ds.values()),
        [a[j] for j in ds],
        x,
        [draws[j] for j in ds],
        dx_dtype=dtype,
        need_dx=need.x,
        need_da=need_da,
    )
    if grouped is None:
        return None
    dx0, das = grouped
    return dx0, das or [None] * len(ds)


def first_given(dys: Sequence[Tensor | None]) -> Tensor:
    """The gradient of the first output that got one; at least one did."""
    return next(dy for dy in dys if dy is not None)


def _with_weights(
    dys: Sequence[Tensor | None], weights: Sequence[Tensor | None]
) -> dict[int, tuple[Tensor, Tensor]]:
    """dy and the weight of the projections with a gradient whose base product is ours."""
    pairs = enumerate(zip(dys, weights, strict=True))
    return {i: (dy, w) for i, (dy, w) in pairs if dy is not None and w is not None}


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

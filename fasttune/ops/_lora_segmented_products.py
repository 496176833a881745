"""Forward and backward of lora_segmented in terms of the primitives of a backend.

One product with the base weight for the whole batch; per segment the four products of lora_linear
on a view of its rows (docs/design.md), so that only rank-sized work depends on the adapters. In
Triton all segments are one launch a product, where they fit: `_lora_segmented_triton`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fasttune import _native
from fasttune.ops import _gemm, _lora_segmented_triton
from fasttune.ops._lora_linear_products import Needs, add_product, branch_scale, total_bias
from fasttune.ops._lora_segmented_plan import gaps, triples


@dataclass(frozen=True)
class _Branches:
    """The branches of a call and the runs of rows they own."""

    prims: ModuleType
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scaling_tensors: Sequence[Tensor | None]
    scalings: Sequence[float]
    thresholds: Sequence[int]
    ids: Sequence[int]
    segments: list[tuple[int, int, int]]
    order: Tensor | None
    seed: Tensor | None

    def scale(self, j: int) -> tuple[float, Tensor | None]:
        return branch_scale(self.scalings[j], self.thresholds[j]), self.scaling_tensors[j]

    def mask(self, start: int, j: int) -> dict[str, Any]:
        draw = {"seed": self.seed, "threshold": self.thresholds[j]}
        return {**draw, "branch": self.ids[j], "row_offset": start}

    def gathered(self, x: Tensor) -> Tensor:
        """The rows that the segments count."""
        return x if self.order is None else x.index_select(0, self.order)

    def covers(self, rows: int) -> bool:
        """True if every row of the batch has a branch, in place."""
        return self.order is None and not gaps(self.segments, rows)

    def products(
        self, left: Tensor, right: Tensor
    ) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
        """For every segment its rows of the product left [M, K] right [K, N], for the kernel that
        takes it with the segment's branch, or nothing; and the rows for which nobody does.
        """
        own, rest = [], []
        for start, stop, _ in self.segments:
            rows = left[start:stop]
            takes = self.prims is _native and _native.takes_product(rows, right)
            own.append({"product": (rows, right)} if takes else {})
            rest += [] if takes else [(start, stop)]
        if len(rest) == len(self.segments):
            rest = [(0, left.shape[0])]
        return own, rest

    def wide(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Factors whose gradient is summed over several segments in fp32: primitives round a
        gradient to the dtype of its factor.
        """
        owners = [j for _, _, j in self.segments]
        return [f.float() if owners.count(j) > 1 else f for j, f in enumerate(factors)]


def _branches(
    prims: ModuleType,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    facts: Sequence[Any],
    segments: Sequence[int],
    order: Tensor | None,
    seed: Tensor | None,
) -> _Branches:
    scaling_tensors, scalings, thresholds, ids = facts
    return _Branches(
        prims, a, b, scaling_tensors, scalings, thresholds, ids, triples(segments), order, seed
    )


def forward_with(prims: ModuleType, *args: Any) -> tuple[Tensor, list[Tensor]]:
    """The forward in terms of the primitives of a backend."""
    x, weight, bias, a, b, lora_biases, *facts, segments, order, seed, dtype = args
    if prims is not _native and segments:
        together = _lora_segmented_triton.forward(*args)
        if together is not None:
            return together
    own = _branches(prims, a, b, facts, segments, order, seed)
    if own.segments and own.covers(x.shape[0]):
        return _every_row(own, x, weight, bias, lora_biases, dtype)
    return _some_rows(own, x, weight, bias, lora_biases, dtype)


def _biases(own: _Branches, bias: Tensor | None, lora_biases: Sequence[Any]) -> list[Tensor | None]:
    """bias + s_j lora_bias_j of every branch."""
    facts = zip(lora_biases, own.scalings, own.scaling_tensors, strict=True)
    return [total_bias(bias, [each], [scaling], [tensor]) for each, scaling, tensor in facts]


def _every_row(
    own: _Branches,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_biases: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """No base rows: branches first, as lora_linear, whose rounding this has."""
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    biases = _biases(own, bias, lora_biases)
    if own.prims is _native and _gemm.through_fp32(x.device, dtype):
        base = _gemm.linear_fp32(x, weight)
        extra = [{"addend": base[start:stop]} for start, stop, _ in own.segments]
        rest: list[tuple[int, int]] = []
    else:
        left, right = x.to(dtype), weight.to(dtype).t()
        extra, rest = own.products(left, right)
    ts = []
    for (start, stop, j), more in zip(own.segments, extra, strict=True):
        more["out"] = y[start:stop]
        draw = own.mask(start, j)
        if "product" in more and left is x:  # in one pass over it
            branch = (more.pop("product"), own.a[j], own.b[j], biases[j], *own.scale(j))
            _, t = own.prims.lora_layer(*branch, **draw, out_dtype=dtype, **more)
        else:
            t = own.prims.lora_down(x[start:stop], own.a[j], *own.scale(j), **draw)
            own.prims.lora_up(t, own.b[j], biases[j], out_dtype=dtype, **more)
        ts.append(t)
    for start, stop in rest:
        y[start:stop].addmm_(left[start:stop], right)
    return y, ts


def _some_rows(
    own: _Branches,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_biases: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """torch's own linear for all rows, so that base rows have its bits; branches are added."""
    y = linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    rows, target, biases = own.gathered(x), own.gathered(y), _biases(own, None, lora_biases)
    ts = []
    for start, stop, j in own.segments:
        t = own.prims.lora_down(rows[start:stop], own.a[j], *own.scale(j), **own.mask(start, j))
        ts.append(t)
        up = own.prims.lora_up(t, own.b[j], biases[j], out_dtype=torch.float32)
        target[start:stop].add_(up)
    return y if own.order is None else y.index_copy_(0, own.order, target), ts


def backward_with(prims: ModuleType, *args: Any) -> list[Tensor]:
    """The backward in terms of the primitives of a backend; `needs` states the order of
    gradients.
    """
    dy, x, weight, a, b, ts, *facts, segments, order, seed, x_dtype, needs = args
    if prims is not _native and segments:
        together = _lora_segmented_triton.backward(*args)
        if together is not None:
            return together
    need = Needs.unpack(needs, 1, len(a))
    own = _branches(prims, a, b, facts, segments, order, seed)
    rows = own.gathered(dy)
    through = _through_base(own, dy, weight, need, x_dtype)
    ds, dbs = _output_side(own, rows, ts, need, through)
    dw = None
    if need.w[0] and x is not None and weight is not None:
        dw = _gemm.weight_gradient(dy, x, weight.dtype)
    dx, das = _input_side(own, dy, x, weight, ds, need, through, x_dtype)
    dbias = dy.sum(0, dtype=torch.float32) if need.bias[0] else None
    wanted = [dx, dw, dbias, *das, *dbs, *_lora_biases(own, rows, need)]
    return [grad for grad, flag in zip(wanted, needs, strict=True) if flag and grad is not None]


@dataclass
class _ThroughBase:
    """dx [M, K] as far as it is known before the branches."""

    dx: Tensor | None = None  # to be written, or dy W
    base: Tensor | None = None  # dy W in fp32, to be added
    target: Tensor | None = None  # the rows of dx, dy W already, that the branches are added to
    extra: list[dict[str, Any]] = field(default_factory=list)  # of each segment: its rows of dy W
    rest: list[tuple[int, int]] = field(default_factory=list)  # rows whose dy W nobody adds


def _through_base(
    own: _Branches, dy: Tensor, weight: Tensor | None, need: Needs, dtype: torch.dtype
) -> _ThroughBase:
    found = _ThroughBase(extra=[{} for _ in own.segments], rest=[(0, dy.shape[0])])
    if not need.x or weight is None:
        return found
    if own.prims is _native and own.order is None and _gemm.through_fp32(dy.device, dy.dtype):
        found.base = _gemm.linear_backward_fp32(dy, weight)
    if found.base is not None or (own.segments and own.covers(dy.shape[0])):
        found.dx = dy.new_empty(dy.shape[0], weight.shape[1], dtype=dtype)
        if found.base is None and dtype in (torch.bfloat16, torch.float32):
            found.extra, found.rest = own.products(dy, weight.to(dy.dtype))
    else:
        found.dx = torch.mm(dy, weight.to(dy.dtype)).to(dtype)
        found.target = own.gathered(found.dx)
    return found


def _output_side(
    own: _Branches, dy: Tensor, ts: Sequence[Tensor | None], need: Needs, through: _ThroughBase
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """d of every segment, or None where it is made beside the segment's rows of dy W; dB of every
    branch.
    """
    dbs: list[Tensor | None] = [None] * len(own.b)
    ds, b = [], own.wide(own.b)
    for (start, stop, j), t, place in zip(own.segments, ts, through.extra, strict=True):
        beside = "product" in place
        if beside:
            place["up"] = (own.b[j], *own.scale(j))
        d, db = own.prims.lora_up_backward(
            *(dy[start:stop], t, b[j], *own.scale(j)),
            need_d=(need.x or need.a[j]) and not beside,
            need_db=need.b[j],
        )
        ds.append(d)
        _accumulate(dbs, j, db)
    return ds, _rounded(dbs, own.b)


def _input_side(
    own: _Branches,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    ds: Sequence[Tensor | None],
    need: Needs,
    through: _ThroughBase,
    dtype: torch.dtype,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx [M, K] and dA of every branch."""
    rows = None if x is None or not any(need.a) else own.gathered(x)
    das: list[Tensor | None] = [None] * len(own.a)
    a = own.wide(own.a)
    for (start, stop, j), d, place in zip(own.segments, ds, through.extra, strict=True):
        if through.dx is not None and through.target is None:
            place["out"] = through.dx[start:stop]
        if through.base is not None:
            place["addend"] = through.base[start:stop]
        part, da = own.prims.lora_down_backward(
            *(d, a[j], None if rows is None else rows[start:stop]),
            **own.mask(start, j),
            dx_dtype=dtype if through.target is None else torch.float32,
            need_dx=need.x,
            need_da=need.a[j],
            **place,
        )
        if through.target is not None:
            through.target[start:stop].add_(part)
        _accumulate(das, j, da)
    return _finished(own, dy, weight, through, dtype), _rounded(das, own.a)


def _finished(
    own: _Branches, dy: Tensor, weight: Tensor | None, through: _ThroughBase, dtype: torch.dtype
) -> Tensor | None:
    """dx with what the segments leave: rows without a branch, or dy W of the rest of the rows."""
    dx = through.dx
    if dx is None or weight is None:
        return None
    if through.base is not None:
        for start, stop in gaps(own.segments, dy.shape[0]):
            dx[start:stop].copy_(through.base[start:stop])
        return dx
    if through.target is None:
        for start, stop in through.rest:
            add_product(dx[start:stop], dy[start:stop], weight.to(dy.dtype), dtype)
        return dx
    return dx if own.order is None else dx.index_copy_(0, own.order, through.target)


def _lora_biases(own: _Branches, dy: Tensor, need: Needs) -> list[Tensor | None]:
    sums: list[Tensor | None] = [None] * len(own.b)
    for start, stop, j in own.segments:
        if need.lora_bias[j]:
            scale, tensor = own.scalings[j], own.scaling_tensors[j]
            total = dy[start:stop].sum(0, dtype=torch.float32) * scale
            _accumulate(sums, j, total if tensor is None else total * tensor)
    return sums


def _accumulate(totals: list[Tensor | None], j: int, part: Tensor | None) -> None:
    if part is not None:
        total = totals[j]
        totals[j] = part if total is None else total.add_(part)


def _rounded(grads: Sequence[Tensor | None], factors: Sequence[Tensor]) -> list[Tensor | None]:
    pairs = zip(grads, factors, strict=True)
    return [None if grad is None else grad.to(factor.dtype) for grad, factor in pairs]

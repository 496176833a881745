"""Forward and backward of lora_segmented in terms of the primitives of a backend.

One product with the base weight for the whole batch; per segment the four products of lora_linear
on a view of its rows (docs/design.md), so that only rank-sized work depends on the adapters. Where
they fit, all segments are one call in C++ (`_lora_segmented_cpu`) and one launch a product in
Triton (`_lora_segmented_triton`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fasttune import _native
from fasttune.ops import _gemm, _lora_segmented_cpu, _lora_segmented_triton
from fasttune.ops._lora_linear_products import Needs, add_product, branch_scale, segment_biases
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

    def biases(self, bias: Tensor | None, lora_biases: Sequence[Any]) -> list[Tensor | None]:
        return segment_biases(bias, lora_biases, self.scalings, self.scaling_tensors)

    def gathered(self, x: Tensor) -> Tensor:
        """The rows that the segments count."""
        return x if self.order is None else x.index_select(0, self.order)

    def covers(self, rows: int) -> bool:
        """True if every row of the batch has a branch, in place."""
        return self.order is None and not gaps(self.segments, rows)

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


def _together(prims: ModuleType) -> ModuleType:
    """What takes all segments at once."""
    return _lora_segmented_cpu if prims is _native else _lora_segmented_triton


def forward_with(prims: ModuleType, *args: Any) -> tuple[Tensor, list[Tensor]]:
    """The forward in terms of the primitives of a backend."""
    x, weight, bias, a, b, lora_biases, *facts, segments, order, seed, dtype = args
    together = _together(prims).forward(*args) if segments else None
    if together is not None:
        found: tuple[Tensor, list[Tensor]] = together
        return found
    own = _branches(prims, a, b, facts, segments, order, seed)
    if own.segments and own.covers(x.shape[0]):
        return _every_row(own, x, weight, bias, lora_biases, dtype)
    return _some_rows(own, x, weight, bias, lora_biases, dtype)


def _every_row(
    own: _Branches,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_biases: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """No base rows: branches first, as lora_linear, whose rounding this has."""
    y, biases = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype), own.biases(bias, lora_biases)
    base = None
    if own.prims is _native and _gemm.through_fp32(x.device, dtype):
        base = _gemm.linear_fp32(x, weight)
    ts = []
    for start, stop, j in own.segments:
        t = own.prims.lora_down(x[start:stop], own.a[j], *own.scale(j), **own.mask(start, j))
        extra = {} if base is None else {"addend": base[start:stop]}
        y[start:stop] = own.prims.lora_up(t, own.b[j], biases[j], out_dtype=dtype, **extra)
        ts.append(t)
    return (y if base is not None else y.addmm_(x.to(dtype), weight.to(dtype).t())), ts


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
    rows, target, biases = own.gathered(x), own.gathered(y), own.biases(None, lora_biases)
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
        grads = _lora_segmented_triton.backward(*args)
        if grads is not None:
            return grads
    need = Needs.unpack(needs, 1, len(a))
    own = _branches(prims, a, b, facts, segments, order, seed)
    rows = own.gathered(dy)
    together = _lora_segmented_cpu.backward(*args) if prims is _native and segments else None
    if together is not None:
        dx, das, dbs = together
    else:
        ds, dbs = _output_side(own, rows, ts, need)
        dx, das = _input_side(own, dy, x, weight, ds, need, x_dtype)
    dw = None
    if need.w[0] and x is not None and weight is not None:
        dw = _gemm.weight_gradient(dy, x, weight.dtype)
    dbias = dy.sum(0, dtype=torch.float32) if need.bias[0] else None
    wanted = [dx, dw, dbias, *das, *dbs, *_lora_biases(own, rows, need)]
    return [grad for grad, flag in zip(wanted, needs, strict=True) if flag and grad is not None]


def _output_side(
    own: _Branches, dy: Tensor, ts: Sequence[Tensor | None], need: Needs
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """d of every segment and dB of every branch."""
    dbs: list[Tensor | None] = [None] * len(own.b)
    ds, b = [], own.wide(own.b)
    for (start, stop, j), t in zip(own.segments, ts, strict=True):
        d, db = own.prims.lora_up_backward(
            *(dy[start:stop], t, b[j], *own.scale(j)),
            need_d=need.x or need.a[j],
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
    dtype: torch.dtype,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx [M, K] and dA of every branch. The branches of a batch that they cover come first and dy W
    is added to them; otherwise they are added to it.
    """
    rows = None if x is None or not any(need.a) else own.gathered(x)
    dx = base = target = None
    covers = bool(own.segments) and own.covers(dy.shape[0])
    if need.x and weight is not None:
        in_fp32 = own.prims is _native and _gemm.through_fp32(dy.device, dy.dtype)
        if own.order is None and in_fp32:
            base = _gemm.linear_backward_fp32(dy, weight)
        if base is not None or covers:
            dx = dy.new_empty(dy.shape[0], weight.shape[1], dtype=dtype)
        else:
            dx = torch.mm(dy, weight.to(dy.dtype)).to(dtype)
            target = own.gathered(dx)
    das: list[Tensor | None] = [None] * len(own.a)
    a = own.wide(own.a)
    for (start, stop, j), d in zip(own.segments, ds, strict=True):
        part, da = own.prims.lora_down_backward(
            *(d, a[j], None if rows is None else rows[start:stop]),
            **own.mask(start, j),
            dx_dtype=dtype if target is None else torch.float32,
            need_dx=need.x,
            need_da=need.a[j],
            **({} if base is None else {"addend": base[start:stop]}),
        )
        if target is not None:
            target[start:stop].add_(part)
        elif dx is not None:
            dx[start:stop] = part
        _accumulate(das, j, da)
    if dx is not None and weight is not None:
        if base is not None:
            for start, stop in gaps(own.segments, dy.shape[0]):
                dx[start:stop].copy_(base[start:stop])
        elif target is None:
            add_product(dx, dy, weight.to(dy.dtype), dtype)
        elif own.order is not None:
            dx.index_copy_(0, own.order, target)
    return dx, _rounded(das, own.a)


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

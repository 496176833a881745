"""Forward and backward of lora_segmented where one launch of a kernel takes all its segments.

The rows of a segment are found through tables (``fasttune_kernels.lora_segments``), so rows in any
order are read and written in place, not gathered. Each function returns None where the branches do
not fit one kernel; segments are then taken one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fasttune.ops import _dropout, _gemm, _triton
from fasttune.ops._lora_linear_products import Needs, add_product
from fasttune.ops._lora_segmented_plan import gaps, triples


def _batch(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    lora_biases: Sequence[Tensor | None],
    facts: Sequence[Any],
    segments: Sequence[int],
    order: Tensor | None,
) -> Any:
    """The tables of a batch with segments, or None."""
    scaling_tensors, scalings, thresholds, ids = facts
    keep_scales = [_dropout.keep_scale(each) for each in thresholds]
    tables = _triton.kernels("lora_segments")
    branches = tables.Branches(
        a, b, scalings, scaling_tensors, keep_scales, thresholds, ids, lora_biases
    )
    return tables.batch_of(segments, order, branches)


def _covers(segments: Sequence[int], order: Tensor | None, rows: int) -> bool:
    """Whether branches come first, as in lora_linear: every row has one, in place."""
    return order is None and not gaps(triples(segments), rows)


def forward(*args: Any) -> tuple[Tensor, list[Tensor]] | None:
    """y and t of every segment."""
    x, weight, bias, a, b, lora_biases, *facts, segments, order, seed, dtype = args
    batch = _batch(a, b, lora_biases, facts, segments, order)
    if batch is None:
        return None
    kernels, tables = _triton.kernels("lora_segmented"), _triton.kernels("lora_segments")
    seed = seed if batch.dropout else None
    t = kernels.down(batch, x, tables.A, seed)
    has_bias = any(each is not None for each in lora_biases)
    if _covers(segments, order, x.shape[0]):
        y = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
        kernels.up(batch, t, y, tables.B, add=False, bias=bias, lora_bias=has_bias)
        y.addmm_(x.to(dtype), weight.to(dtype).t())
    else:  # torch's own linear for all rows, so that base rows have its bits
        y = linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        kernels.up(batch, t, y, tables.B, add=True, lora_bias=has_bias)
    return y, batch.by_segment(t)


def backward(*args: Any) -> list[Tensor] | None:
    """The gradients that are needed; `needs` states their order."""
    dy, x, weight, a, b, ts, *facts, segments, order, seed, x_dtype, needs = args
    need = Needs.unpack(needs, 1, len(a))
    batch = _batch(a, b, [None] * len(a), facts, segments, order)
    if batch is None:
        return None
    kernels, tables = _triton.kernels("lora_segmented"), _triton.kernels("lora_segments")
    seed = seed if batch.dropout else None
    of_a, of_b, of_bias = (
        [j for j, flag in enumerate(flags) if flag] for flags in (need.a, need.b, need.lora_bias)
    )
    d = kernels.down(batch, dy, tables.B) if need.x or of_a else None
    dbs = das = dlora_biases = []
    if of_b:
        dbs = kernels.weight_grads(batch, dy, batch.buffer_of(ts), of_b, tables.B)
    if of_a:
        das = kernels.weight_grads(batch, x, d, of_a, tables.A, seed)
    if of_bias:
        dlora_biases = kernels.column_sums(batch, dy, of_bias)
    dx = dw = dbias = None
    if need.x:
        if _covers(segments, order, dy.shape[0]):
            dx = dy.new_empty(dy.shape[0], weight.shape[1], dtype=x_dtype)
            kernels.up(batch, d, dx, tables.A, add=False, seed=seed)
            dx = add_product(dx, dy, weight.to(dy.dtype), x_dtype)
        else:
            dx = torch.mm(dy, weight.to(dy.dtype)).to(x_dtype)
            kernels.up(batch, d, dx, tables.A, add=True, seed=seed)
    if need.w[0]:
        dw = _gemm.weight_gradient(dy, x, weight.dtype)
    if need.bias[0]:
        dbias = dy.sum(0, dtype=torch.float32)
    return [each for each in (dx, dw, dbias, *das, *dbs, *dlora_biases) if each is not None]

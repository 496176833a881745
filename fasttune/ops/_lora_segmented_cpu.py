"""Forward and backward of lora_segmented in C++ where every row has a branch, in place: one call
for all segments, with the base product on tiles where they take it.

Each function returns None where that does not hold; segments are then taken one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttune import _native
from fasttune.ops import _gemm
from fasttune.ops._lora_linear_products import (
    Needs,
    add_product,
    branch_scale,
    segment_biases,
)
from fasttune.ops._lora_segmented_plan import gaps, triples

# Tiles take the rows of a run 32 at a time (kRowsOfBlock of csrc/cpu/amx): they multiply at most
# this many rows for each that there is.
_ROWS_OF_BLOCK, _MOST_PADDING = 32, 1.5


def _branches(
    a: Sequence[Tensor], b: Sequence[Tensor], biases: Sequence[Any], facts: Sequence[Any], seed: Any
) -> _native.Branches:
    scaling_tensors, scalings, thresholds, ids = facts
    scales = [
        branch_scale(scaling, threshold) * (1.0 if tensor is None else float(tensor))
        for scaling, threshold, tensor in zip(scalings, thresholds, scaling_tensors, strict=True)
    ]
    return _native.Branches(a, b, biases, scales, seed, thresholds, ids)


def _on_tiles(left: Tensor, right: Tensor, runs: Sequence[tuple[int, int, int]]) -> bool:
    """Whether the product left right is faster on tiles, a run at a time."""
    padded = sum(-(-(end - first) // _ROWS_OF_BLOCK) for first, end, _ in runs) * _ROWS_OF_BLOCK
    fits = padded <= _MOST_PADDING * left.shape[0]
    return fits and _native.takes_product(left, right)


def forward(*args: Any) -> tuple[Tensor, list[Tensor]] | None:
    """y and t of every segment."""
    x, weight, bias, a, b, lora_biases, *facts, segments, order, seed, dtype = args
    runs = triples(segments)
    biases = segment_biases(bias, lora_biases, facts[1], facts[0])
    branches = _branches(a, b, biases, facts, seed)
    if order is not None or gaps(runs, x.shape[0]) or not _native.takes_runs(x, branches):
        return None
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    if _gemm.through_fp32(x.device, dtype):
        return y, _native.runs_forward(x, None, _gemm.linear_fp32(x, weight), runs, branches, y)
    left, right = x.to(dtype), weight.to(dtype).t()
    if left is x and _on_tiles(left, right, runs):
        return y, _native.runs_forward(x, right, None, runs, branches, y)
    ts = _native.runs_forward(x, None, None, runs, branches, y)
    return y.addmm_(left, right), ts


def backward(*args: Any) -> tuple[Tensor | None, list[Any], list[Any]] | None:
    """dx, and dA and dB of every branch."""
    dy, x, weight, a, b, ts, *facts, segments, order, seed, x_dtype, needs = args
    runs, need = triples(segments), Needs.unpack(needs, 1, len(a))
    branches = _branches(a, b, [None] * len(a), facts, seed)
    if order is not None or gaps(runs, dy.shape[0]) or not _native.takes_runs(dy, branches):
        return None
    dx = addend = product = rest = None
    if need.x:
        dx = dy.new_empty(dy.shape[0], weight.shape[1], dtype=x_dtype)
        if _gemm.through_fp32(dy.device, dy.dtype):
            addend = _gemm.linear_backward_fp32(dy, weight)
        else:
            right = weight.to(dy.dtype)
            tiles = x_dtype in (torch.bfloat16, torch.float32) and _on_tiles(dy, right, runs)
            product, rest = (right, None) if tiles else (None, right)
    das, dbs = _native.runs_backward(
        dy, product, addend, x, runs, branches, ts, dx, need.a, need.b
    )  # fmt: skip
    if rest is not None and dx is not None:
        add_product(dx, dy, rest, x_dtype)
    return dx, das, dbs

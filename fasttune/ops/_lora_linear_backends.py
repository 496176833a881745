"""The registered ops of lora_linear: schema, fake and one implementation per backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttune import _native, _registry
from fasttune._native import lora_cuda
from fasttune.ops import _lora_linear_reference, _support
from fasttune.ops._arguments import accumulator
from fasttune.ops._lora_linear_products import Needs, backward_with, first_given, forward_with

# backends

_TENSORS = "Tensor?[] weights, Tensor?[] biases, Tensor[] a, Tensor[] b, Tensor?[] lora_biases"
_FACTS = (
    "Tensor?[] scaling_tensors, float[] scalings, int[] thresholds, int[] counts, Tensor?[] seeds"
)


def _forward_fake(
    x: Tensor, weights: Sequence[Tensor | None], biases: Any, a: Sequence[Tensor], *rest: Any
) -> tuple[list[Tensor], list[Tensor]]:
    dtype, bases = rest[-3:-1]
    ys = [
        torch.empty_like(base) if w is None else x.new_empty(x.shape[0], w.shape[0], dtype=dtype)
        for w, base in zip(weights, bases, strict=True)
    ]
    ts = [x.new_empty(x.shape[0], f.shape[0], dtype=accumulator(dtype)) for f in a]
    return ys, ts


def _backward_fake(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    weights: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *rest: Any,
) -> list[Tensor]:
    x_dtype, needs = rest[-3:-1]
    need = Needs.unpack(needs, len(weights), len(a))
    dy = first_given(dys)
    grads = []
    if need.x:
        columns = next(w.shape[1] for w in (*weights, *a) if w is not None)
        grads.append(dy.new_empty(dy.shape[0], columns, dtype=x_dtype))
    sum_dtype = accumulator(dy.dtype)
    trained = [w for w, flag in zip(weights, need.w, strict=True) if flag and w is not None]
    grads += [torch.empty_like(w) for w in trained]
    grads += [
        dy.new_empty(g.shape[1], dtype=sum_dtype)
        for g, flag in zip(dys, need.bias, strict=True)
        if flag and g is not None
    ]
    grads += [torch.empty_like(f) for f, flag in zip(a, need.a, strict=True) if flag]
    grads += [torch.empty_like(f) for f, flag in zip(b, need.b, strict=True) if flag]
    grads += [
        dy.new_empty(f.shape[0], dtype=sum_dtype)
        for f, flag in zip(b, need.lora_bias, strict=True)
        if flag
    ]
    return grads


FORWARD = _registry.define(
    "lora_linear_fwd",
    f"(Tensor x, {_TENSORS}, {_FACTS}, ScalarType compute_dtype, Tensor?[] bases, int[] streams) "
    "-> (Tensor[], Tensor[])",
    _forward_fake,
)
BACKWARD = _registry.define(
    "lora_linear_bwd",
    "(Tensor?[] dys, Tensor? x, Tensor?[] weights, Tensor[] a, Tensor[] b, Tensor?[] ts, "
    f"{_FACTS}, ScalarType x_dtype, bool[] needs, int[] streams) -> Tensor[]",
    _backward_fake,
)


_support.register_lora_backends(
    FORWARD, BACKWARD, forward_with, backward_with, _lora_linear_reference
)


def _forward_on_cuda(
    x: Tensor, weights: Any, biases: Any, a: Sequence[Tensor], b: Sequence[Tensor], *rest: Any
) -> str | None:
    missing = _support.why_not_cuda((x, *biases, *a, *b))
    if missing is not None:
        return missing
    *_, counts, _, dtype, bases, _ = rest
    if any(base is not None for base in bases):
        return "it takes layers with a weight, got the output of a base"
    return _why_not_cuda((x,), a, b, counts, dtype)


def _backward_on_cuda(
    dys: Sequence[Tensor | None], x: Tensor | None, weights: Any, a: Sequence[Tensor],
    b: Sequence[Tensor], *rest: Any,
) -> str | None:  # fmt: skip
    missing = _support.why_not_cuda((x, *dys, *a, *b))
    if missing is not None:
        return missing
    *_, counts, _, dtype, _, _ = rest
    return _why_not_cuda((x, *dys), a, b, counts, dtype)


def _why_not_cuda(
    operands: Sequence[Tensor | None],
    a: Sequence[Tensor],  # [R, K]
    b: Sequence[Tensor],  # [N, R]
    counts: Sequence[int],
    dtype: torch.dtype,
) -> str | None:
    """Why the CUDA C++ kernels cannot take such branches, or None."""
    given = [tensor for tensor in operands if tensor is not None]
    others = [t.dtype for t in given if t.dtype != dtype or dtype == torch.float32]
    if others:
        return f"it takes x in bf16 or fp16, as it is computed, got {others[0]}"
    if max(counts, default=0) > 1:
        return f"it takes one adapter a layer, got {max(counts)}"
    for factor in (*a, *b):
        if factor.dtype != dtype and (factor.dtype, dtype) != (torch.float32, torch.bfloat16):
            return f"it takes A and B as x or, beside bf16, in fp32, got {factor.dtype}"
    for down, up in zip(a, b, strict=True):
        wide = torch.float32 in (down.dtype, up.dtype)
        most = lora_cuda.MAX_RANK_FP32 if wide else lora_cuda.MAX_RANK
        if down.shape[0] % lora_cuda.MULTIPLE or down.shape[0] > most:
            return (
                f"it takes ranks that are multiples of {lora_cuda.MULTIPLE} up to {most}"
                f"{' in fp32' if wide else ''}, got {down.shape[0]}"
            )
    for width in (*(factor.shape[1] for factor in a), *(factor.shape[0] for factor in b)):
        if width % lora_cuda.MULTIPLE:
            return f"it takes features in multiples of {lora_cuda.MULTIPLE}, got {width}"
    device = given[0].device
    if not _native.cuda_emulated() and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it takes GPUs from sm_80 on, got {torch.cuda.get_device_name(device)}"
    return None


FORWARD.backend("cuda", _forward_on_cuda)(partial(forward_with, lora_cuda))
BACKWARD.backend("cuda", _backward_on_cuda)(partial(backward_with, lora_cuda))

"""The registered ops of lora_segmented: schema, fake and one implementation per backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttune import _registry
from fasttune.ops import _lora_segmented_reference, _support
from fasttune.ops._arguments import accumulator
from fasttune.ops._lora_linear_products import Needs
from fasttune.ops._lora_segmented_plan import triples
from fasttune.ops._lora_segmented_products import backward_with, forward_with

_FACTS = (
    "Tensor?[] scaling_tensors, float[] scalings, int[] thresholds, int[] ids, int[] segments, "
    "Tensor? order, Tensor? seed"
)


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Any, a: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    *_, segments, _, _, dtype = rest
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    wide = accumulator(dtype)
    ts = [x.new_empty(stop - at, a[j].shape[0], dtype=wide) for at, stop, j in triples(segments)]
    return y, ts


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *rest: Any,
) -> list[Tensor]:
    x_dtype, needs = rest[-2], rest[-1]
    need, wide = Needs.unpack(needs, 1, len(a)), accumulator(dy.dtype)
    grads = []
    if need.x:
        assert weight is not None
        grads.append(dy.new_empty(dy.shape[0], weight.shape[1], dtype=x_dtype))
    if need.w[0]:
        assert weight is not None
        grads.append(torch.empty_like(weight))
    if need.bias[0]:
        grads.append(dy.new_empty(dy.shape[1], dtype=wide))
    for factors, flags in ((a, need.a), (b, need.b)):
        grads += [torch.empty_like(f) for f, flag in zip(factors, flags, strict=True) if flag]
    grads += [dy.new_empty(dy.shape[1], dtype=wide) for flag in need.lora_bias if flag]
    return grads


FORWARD = _registry.define(
    "lora_segmented_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, Tensor?[] lora_biases, "
    f"{_FACTS}, ScalarType compute_dtype) -> (Tensor, Tensor[])",
    _forward_fake,
)
BACKWARD = _registry.define(
    "lora_segmented_bwd",
    "(Tensor dy, Tensor? x, Tensor? weight, Tensor[] a, Tensor[] b, Tensor?[] ts, "
    f"{_FACTS}, ScalarType x_dtype, bool[] needs) -> Tensor[]",
    _backward_fake,
)


# Which rows are whose is read from a tensor, on the host.
_support.register_lora_backends(
    FORWARD, BACKWARD, forward_with, backward_with, _lora_segmented_reference, repeated=False
)

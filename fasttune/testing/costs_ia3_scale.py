"""What ia3_scale launches, for :mod:`fasttune.testing.costs`: one kernel each way, and a second
pass over the partial sums of two programs a multiprocessor (132 of them) where the scale trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fasttune.testing.accounting import Launch, register_cost, tensor_bytes

_FP32_BYTES = 4
_PROGRAMS = 2 * 132
_COLUMNS, _MIN_ROWS = 128, 64  # of a program


def _forward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    return [Launch("fasttune::scaled_sum", sum(map(tensor_bytes, args)), tensor_bytes(result))]


def _backward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    dy, x, scale, needs = args
    reads = sum(tensor_bytes(t) for t in (dy, x, scale) if t is not None)
    written = tensor_bytes(dy) if needs[0] else 0
    if not needs[1]:
        return [Launch("fasttune::scaled_sum", reads, written)]
    rows, features = dy.shape
    splits = min(-(-_PROGRAMS // -(-features // _COLUMNS)), -(-rows // _MIN_ROWS))
    partial, vector = splits * features * _FP32_BYTES, features * _FP32_BYTES
    return [
        Launch("fasttune::ia3_scale_backward", reads, written + partial),
        Launch("fasttune::ia3_scale_backward.dscale", partial, vector),
    ]


register_cost("fasttune::ia3_scale_fwd", _forward)
register_cost("fasttune::ia3_scale_bwd", _backward)

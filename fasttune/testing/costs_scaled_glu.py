"""What scaled_glu launches, for :mod:`fasttune.testing.costs`: one kernel each way, and a second
pass over the partial sums of two programs a multiprocessor (132 of them) where the scale trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fasttune.testing.accounting import Launch, register_cost, tensor_bytes

_FP32_BYTES = 4
_PROGRAMS = 2 * 132
_COLUMNS, _MIN_ROWS = 128, 64  # of a program


def _read(args: tuple[Any, ...]) -> int:
    return sum(tensor_bytes(arg) for arg in args if isinstance(arg, Tensor))


def _forward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    return [Launch("fasttune::scaled_glu_forward", _read(args), tensor_bytes(result))]


def _backward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    dy, needs = args[0], args[-1]
    written = sum(map(tensor_bytes, result[:-1] if needs[2] else result))
    if not needs[2]:
        return [Launch("fasttune::scaled_glu_backward", _read(args), written)]
    rows, features = dy.shape
    splits = min(-(-_PROGRAMS // -(-features // _COLUMNS)), -(-rows // _MIN_ROWS))
    partial, vector = splits * features * _FP32_BYTES, features * _FP32_BYTES
    return [
        Launch("fasttune::scaled_glu_backward", _read(args), written + partial),
        Launch("fasttune::scaled_glu_backward.dscale", partial, vector),
    ]


register_cost("fasttune::scaled_glu_fwd", _forward)
register_cost("fasttune::scaled_glu_bwd", _backward)

"""What the norms launch inside, for :mod:`fasttune.testing.costs`: one kernel each way, and a
second pass over the partial sums of each trained vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fasttune.testing.accounting import Launch, register_cost

_FP32_BYTES = 4
_PROGRAMS = 2 * 132  # partial sums of a backward with trained weights: two programs a processor


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _forward(name: str) -> Any:
    def cost(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        return [Launch(f"fasttune::{name}_forward", _bytes(*tensors), _bytes(*result))]

    return cost


def _backward(name: str, needs_at: int) -> Any:
    def cost(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
        need_dx, *vectors = args[needs_at:]
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        written = _bytes(result[0]) if need_dx else 0
        features = args[1].shape[1]
        partial = _PROGRAMS * features * _FP32_BYTES
        trained = sum(vectors)
        kernel = f"fasttune::{name}_backward"
        launches = [Launch(kernel, _bytes(*tensors), written + trained * partial)]
        second = Launch(f"{kernel}.second_pass", partial, features * _FP32_BYTES)
        return launches + [second] * trained

    return cost


for _name, _position in (("rms_norm", 6), ("layer_norm", 7)):
    register_cost(f"fasttune::{_name}_fwd", _forward(_name))
    register_cost(f"fasttune::add_{_name}_fwd", _forward(f"add_{_name}"))
    register_cost(f"fasttune::{_name}_bwd", _backward(_name, _position))

"""What glu and bias_activation launch, for :mod:`fasttune.testing.costs`: one kernel each way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fasttune.testing.accounting import Launch, register_cost

_FP32_BYTES = 4


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _glu_forward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    return [Launch("fasttune::glu_forward", _bytes(*args[:2]), _bytes(result))]


def _glu_backward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    dy, gate, up, _, _, needs = args
    reads = _bytes(dy, gate, up if needs[0] else None)  # up's own gradient needs the gate only
    return [Launch("fasttune::glu_backward", reads, _bytes(*result))]


def _bias_activation_forward(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> list[Launch]:
    return [Launch("fasttune::bias_activation_forward", _bytes(*args[:2]), _bytes(result))]


def _bias_activation_backward(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> list[Launch]:
    dy, x, bias, _, needs = args
    # A trained bias takes dz in the dtype of y; dx is rounded from it if x is narrower.
    written = x.numel() * (dy if needs[1] else x).element_size()
    launches = [Launch("fasttune::bias_activation_backward", _bytes(dy, x, bias), written)]
    if needs[1]:
        launches.append(Launch("fasttune::column_sum", written, x.shape[1] * _FP32_BYTES))
    if all(needs) and x.dtype != dy.dtype:
        launches.append(Launch("aten::_to_copy", written, _bytes(x)))
    return launches


register_cost("fasttune::glu_fwd", _glu_forward)
register_cost("fasttune::glu_bwd", _glu_backward)
register_cost("fasttune::bias_activation_fwd", _bias_activation_forward)
register_cost("fasttune::bias_activation_bwd", _bias_activation_backward)

"""What attention launches inside, declared for :mod:`fasttune.testing.accounting`: one kernel a
pass, each argument read once; the scores stay on chip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fasttune.testing.accounting import Launch, register_cost


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _forward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Sequence[Launch]:
    return [Launch("fasttune::attention_fwd", _bytes(*args[:4]), _bytes(*result))]


def _backward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Sequence[Launch]:
    return [Launch("fasttune::attention_bwd", _bytes(*args[:8]), _bytes(*result))]


register_cost("fasttune::attention_fwd", _forward)
register_cost("fasttune::attention_bwd", _backward)

"""What rope launches inside, declared for :mod:`fasttune.testing.accounting`: one kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fasttune.testing.accounting import Launch, register_cost, tensor_bytes


def _rotation(name: str) -> Any:
    def cost(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
        x, y, cos, sin = args[:4]
        given = [tensor for tensor in (x, y) if tensor is not None]
        # Keys of another dtype than the queries take a launch of their own.
        launches = 2 if len({tensor.dtype for tensor in given}) == 2 else 1
        angles = tensor_bytes(cos) + tensor_bytes(sin)
        moved = sum(tensor_bytes(tensor) for tensor in given)
        if launches == 1:
            return [Launch(name, moved + angles, moved)]
        return [Launch(name, tensor_bytes(t) + angles, tensor_bytes(t)) for t in given]

    return cost


register_cost("fasttune::rope_fwd", _rotation("fasttune::rope_forward"))
register_cost("fasttune::rope_bwd", _rotation("fasttune::rope_backward"))

"""What rms_norm and layer_norm launch inside, declared for :mod:`fasttune.testing.accounting`.

One kernel a call; the gradients of the parameters add a second pass over the partial sums of two
persistent programs a multiprocessor (132 of them, as costs.py assumes), and beyond 8192 features or
without a gradient of x they are a kernel of their own (fasttune_kernels/norm_columns.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fasttune.testing.accounting import Cost, Launch, register_cost

_FP32_BYTES = 4
_PROGRAMS = 2 * 132
_COLUMNS = 128  # of a program of norm_columns.py
_MAX_SUMMED_FEATURES = 8192


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _one_launch(name: str) -> Cost:
    def cost(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
        given = [arg for arg in args if isinstance(arg, Tensor)]
        return [Launch(name, _bytes(*given), _bytes(*result))]

    return cost


def _backward(name: str, statistics: int, sums: tuple[str, ...]) -> Cost:
    """``sums``: the names of the sums over the rows, whose flags follow that of dx at the end."""

    def cost(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
        dy, x, weight = args[:3]
        stats, addend = args[3 : 3 + statistics], args[3 + statistics]
        need_dx, *needs = args[-1 - len(sums) :]
        wanted = [sum_name for sum_name, need in zip(sums, needs, strict=True) if need]
        features = x.shape[1]
        fused = need_dx and features <= _MAX_SUMMED_FEATURES
        splits = _PROGRAMS if fused else -(-_PROGRAMS // -(-features // _COLUMNS))
        partial = min(splits, x.shape[0]) * features * _FP32_BYTES
        launches = []
        if need_dx:
            written = _bytes(x) + (partial * len(wanted) if fused else 0)
            launches.append(Launch(name, _bytes(dy, x, weight, *stats, addend), written))
        if wanted and not fused:
            read = _bytes(dy, x, *stats)
            launches.append(Launch(f"{name}.columns", read, partial * len(wanted)))
        vector = features * _FP32_BYTES
        launches += [Launch(f"{name}.{sum_name}", partial, vector) for sum_name in wanted]
        return launches

    return cost


register_cost("fasttune::rms_norm_fwd", _one_launch("fasttune::rms_norm_forward"))
register_cost("fasttune::add_rms_norm_fwd", _one_launch("fasttune::add_rms_norm_forward"))
register_cost("fasttune::rms_norm_bwd", _backward("fasttune::rms_norm_backward", 1, ("dweight",)))
register_cost("fasttune::layer_norm_fwd", _one_launch("fasttune::layer_norm_forward"))
register_cost("fasttune::add_layer_norm_fwd", _one_launch("fasttune::add_layer_norm_forward"))
register_cost(
    "fasttune::layer_norm_bwd", _backward("fasttune::layer_norm_backward", 2, ("dweight", "dbias"))
)

"""Numeric proof: a module's own forward runs on small random tensors, in a copy that shares nothing
that could be changed. Real weights are not read, so meta, quantised and sharded ones are no
obstacle; the user's random state is not consumed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasttune.patching import swap

_SCALARS = (int, float, str, bool, type(None))
# What a forward of arbitrary code may raise on a probe that it was not written for.
ANY_ERROR = Exception


def generator() -> torch.Generator:
    """A private source of random numbers, the same ones for every proof."""
    return torch.Generator("cpu").manual_seed(20260)


@contextlib.contextmanager
def quiet(autocast: torch.dtype | None = None) -> Iterator[None]:
    """No gradients, the given CPU autocast (None: off), and the user's random state untouched."""
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        yield


def imitation(
    module: nn.Module,
    *,
    parameters: Mapping[str, Tensor | None] | None = None,
    children: Mapping[str, nn.Module | None] | None = None,
    training: bool = False,
) -> nn.Module:
    """An object of the module's original class with its attributes, but other parameters and
    children.
    """
    cls = swap.original_class(module)
    twin: nn.Module = object.__new__(cls)
    twin.__dict__.update(module.__dict__)
    twin.__dict__["training"] = training
    twin.__dict__["_parameters"] = dict(parameters or {})
    twin.__dict__["_modules"] = dict(children or {})
    return twin


def run(twin: nn.Module, *args: Any) -> Any:
    """The forward of an imitation, without hooks."""
    return type(twin).forward(twin, *args)


class _Counter(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        return function(*args, **(kwargs or {}))


def operations(twin: nn.Module, *args: Any) -> int:
    """How many operators of torch a forward of an imitation dispatches."""
    counter = _Counter()  # type: ignore[no-untyped-call]
    with counter:
        run(twin, *args)
    return counter.calls


def signature(module: nn.Module) -> tuple[Any, ...]:
    """What a proof may depend on: equal signatures within one model have equal proofs."""
    own = sorted(
        (name, value if isinstance(value, _SCALARS) else id(value))
        for name, value in module.__dict__.items()
        if not name.startswith("_") and name != "training"
    )
    parameters = tuple(
        (name, None if p is None else tuple(p.shape)) for name, p in module._parameters.items()
    )
    children = tuple(
        (name, None if child is None else _child_signature(child))
        for name, child in module._modules.items()
    )
    return swap.original_class(module), tuple(own), parameters, children


def _child_signature(child: nn.Module) -> tuple[Any, ...]:
    if any(True for _ in child.parameters()):
        return swap.original_class(child), width(child)
    return signature(child)


def width(linear: nn.Module) -> int | None:
    """Output features of a linear-like module (nn.Linear, Conv1D, a PEFT layer)."""
    for name in ("out_features", "nf"):
        size = getattr(linear, name, None)
        if isinstance(size, int):
            return size
    return None


def settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Numbers, words and functions among a module's attributes: a later change voids a proof."""
    return tuple(
        (name, value)
        for name, value in module.__dict__.items()
        if name[0] != "_" and name != "training" and (type(value) in _SCALARS or callable(value))
    )

"""Which adapter each sample of a batch has, while a mixed batch runs: per thread, per layer.

A recomputation (gradient checkpointing) runs in backward, after the context was left, perhaps on
autograd's thread and after other batches. So the assignment travels inside the checkpointed
function: for the time of a context, ``_gradient_checkpointing_func`` of the model's modules binds
what it runs to the assignment of its own forward. A recomputation that was not bound (a direct
call of ``torch.utils.checkpoint``) cannot know its assignment and raises.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from fasttune import _torch
from fasttune.patching import state

_ATTRIBUTE = "_gradient_checkpointing_func"  # of transformers' checkpointed modules

# Layers by identity: a context holds its model, so that no identity is reused while it lasts.
Names = tuple[str, ...]


class _Current(threading.local):
    layers: Mapping[int, Names] = {}
    in_backward = False


_current = _Current()
_lock = threading.Lock()
_contexts = 0
# What a traced forward reads: torch.compile guards a module's bool, and no thread's attribute.
_any_context = False
# Whether this process has run a mixed batch at all.
seen = False


def anywhere() -> bool:
    """Whether any thread may run a mixed batch, or may recompute one of before."""
    return seen and (_any_context or _torch.inside_backward())


def traced() -> bool:
    """For a forward that is being traced: True in a context of any model, on this thread."""
    return _any_context and bool(_current.layers)


def lost_by(layer: nn.Module) -> bool:
    """True for a DataParallel replica, which runs on a thread of its own, during any context."""
    return _any_context and bool(layer.__dict__.get("_is_replica"))


def names_of(layer: nn.Module) -> Names | None:
    """The adapter of each sample for this layer, or None outside a mixed batch."""
    return _current.layers.get(id(layer))


def is_unbound() -> bool:
    """True in a recomputation whose assignment is not the one of its forward."""
    return _torch.inside_backward() and not _current.in_backward


@contextlib.contextmanager
def entered(layers: Mapping[int, Names]) -> Iterator[None]:
    """On this thread, these layers, and no others, run mixed batches."""
    previous = _current.layers, _current.in_backward
    _current.layers, _current.in_backward = layers, _torch.inside_backward()
    try:
        yield
    finally:
        _current.layers, _current.in_backward = previous


@contextlib.contextmanager
def assigned(layers: list[nn.Module], names: Names) -> Iterator[None]:
    """On this thread, these layers too run mixed batches with ``names``."""
    _count(1)
    for layer in layers:  # after ``seen``: what falls asleep from here on wakes by itself (lora.py)
        for record in state.all_of(layer).values():
            record.small = None
    try:
        with entered({**_current.layers, **{id(layer): names for layer in layers}}):
            yield
    finally:
        _count(-1)


def _count(step: int) -> None:
    global _contexts, _any_context, seen
    with _lock:
        seen = True
        _contexts += step
        _any_context = _contexts > 0


class _Bound:
    """A checkpointing function that runs what it is given, and runs it again, with the assignment
    of the thread that called it."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.users = 0

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layers = _current.layers

        def run(*inner: Any, **named: Any) -> Any:
            with entered(layers):
                return function(*inner, **named)

        return self.original(run if layers else function, *args, **kwargs)


@contextlib.contextmanager
def bound_checkpointing(model: nn.Module) -> Iterator[None]:
    """While entered, by any number of threads, checkpoints of the model keep their assignment."""
    modules = [module for module in model.modules() if _ATTRIBUTE in module.__dict__]
    with _lock:
        for module in modules:
            function = module.__dict__[_ATTRIBUTE]
            if not isinstance(function, _Bound):
                function = module.__dict__[_ATTRIBUTE] = _Bound(function)
            function.users += 1
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                function = module.__dict__.get(_ATTRIBUTE)
                if isinstance(function, _Bound):
                    function.users -= 1
                    if function.users == 0:
                        module.__dict__[_ATTRIBUTE] = function.original

"""Class swap: a module's class becomes a subclass of its exact class with another ``forward``.

Parameters, state_dict keys, hooks, isinstance and the class's name survive, and gradient
checkpointing, which wraps ``__call__``, still applies. An instance-level ``forward`` would not
survive deepcopy, pickle or checkpointing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor, nn
from torch.compiler import is_compiling

from fasttune import _registry
from fasttune.errors import PatchError
from fasttune.ops import policy
from fasttune.patching import guard, state

# forward(module, original_forward, *args, **kwargs); original_forward takes the module first.
Forward = Callable[..., Any]


class _Stock(threading.local):
    active = False


_stock = _Stock()


@contextlib.contextmanager
def stock() -> Iterator[None]:
    """On this thread, swapped modules run their original forward: the stock model, in place."""
    previous, _stock.active = _stock.active, True
    try:
        yield
    finally:
        _stock.active = previous


_forwards: dict[tuple[str, str], Forward] = {}
_in_stock: set[str] = set()
_of_tensor: dict[str, str] = {}  # what keeps modules of the kind awake, by kind
_classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def register_kind(
    kind: str,
    forward: Forward,
    *,
    class_name: str = "",
    in_stock: bool = False,
    of_tensor: bool = False,
    awake_with: str = "",
) -> None:
    """Name the forward of a kind of swap, of classes of one name or of all others; names, not
    functions, travel in pickles.

    Args:
        in_stock: without it the stock model cannot run, so :func:`stock` keeps it.
        of_tensor: the modules are functions of one tensor, their first argument, which ``forward``
            gets by position.
        awake_with: of these, an attribute that has to be empty for what was too small to stay so.
    """
    _forwards[kind, class_name] = forward
    if in_stock:
        _in_stock.add(kind)
    if of_tensor:
        _of_tensor[kind] = awake_with


def swapped_class(original: type[nn.Module], kind: str) -> type[nn.Module]:
    """The subclass of ``original`` whose forward is that of ``kind``; one per pair."""
    cached = _classes.get((original, kind))
    if cached is not None:
        return cached
    fused = _forwards.get((kind, original.__name__)) or _forwards[kind, ""]
    forward = (_forward_of_tensor if kind in _of_tensor else _forward_of)(original, kind, fused)

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        root, kinds = _history(type(self))
        contents = object.__reduce_ex__(self, 2)[2]
        return _rebuild, (root, kinds), contents

    namespace = {
        "forward": forward,
        "__reduce_ex__": reduce_ex,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_fasttune_kind": kind,
        "_fasttune_original": original,
    }
    subclass = cast(
        "type[nn.Module]",
        types.new_class(original.__name__, (original,), exec_body=lambda ns: ns.update(namespace)),
    )
    _classes[original, kind] = subclass
    return subclass


def _forward_of(original: type[nn.Module], kind: str, fused: Forward) -> Forward:
    own = original.forward

    @functools.wraps(own)  # trainers read the signature of forward
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _stock.active and kind not in _in_stock:
            return own(self, *args, **kwargs)
        return fused(self, own, *args, **kwargs)

    return forward


def _forward_of_tensor(original: type[nn.Module], kind: str, fused: Forward) -> Forward:
    """Of a function of one tensor. What a kind has found too small once (guard.py) gets no further
    than here, and this makes no call that it can do without: between two large products a call of
    Python finds its code in no cache, which a small model would feel (20 us a layer).
    """
    own = original.forward
    name = next(iter(list(inspect.signature(own).parameters)[1:]), "")  # after self
    too_small, awake_with = guard.TOO_SMALL.text, _of_tensor[kind]

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _stock.active:
            return own(self, *args, **kwargs)
        if not args:
            if name not in kwargs:  # the module's own forward knows what it takes, or raises
                if not is_compiling():
                    state.note_fallback(self._fasttune_state[kind], guard.EXTRA)
                return own(self, **kwargs)
            args = (kwargs.pop(name),)
        if len(args) == 1 and not kwargs and not is_compiling():
            x, record = args[0], self._fasttune_state[kind]
            small = record.small  # once: another thread may forget it
            if (
                small is not None
                and type(x) is Tensor
                and x.numel() <= small[0]
                and small[1] is policy.limits
                and small[2] is x.dtype
                and x.is_cpu
                and not _registry.forced_in_context.get()
                and not _registry.forced_by_environment
                and not (awake_with and self.__dict__.get(awake_with))
            ):
                record.fallbacks[too_small] += 1
                return own(self, x)
        return fused(self, own, *args, **kwargs)

    return forward


def swap(module: nn.Module, kind: str) -> None:
    """Give ``module`` the forward of ``kind``.

    Raises:
        PatchError: the module has an instance-level ``forward``, which would hide the new one.
    """
    if "forward" in module.__dict__:
        raise PatchError(f"{type(module).__name__} has an instance-level forward")
    module.__class__ = swapped_class(type(module), kind)


def restore(module: nn.Module, kind: str) -> None:
    """Undo :func:`swap`.

    Raises:
        PatchError: somebody else (FSDP2, parametrize) swapped the class on top of ours.
    """
    check_restorable(module, kind)
    module.__class__ = type(module)._fasttune_original  # type: ignore[attr-defined]


def check_restorable(module: nn.Module, kind: str) -> None:
    """Raises PatchError unless the module's class is exactly the one that :func:`swap` gave it."""
    own = type(module).__dict__.get("_fasttune_kind")
    if own not in kinds_of(module):
        raise PatchError(
            f"{type(module).__name__}: another library swapped the class after fasttune.patch; "
            "undo that first (or unpatch before sharding)"
        )


def kinds_of(module: nn.Module) -> tuple[str, ...]:
    """The kinds swapped onto the module, the first one first."""
    return _history(type(module))[1]


def _history(cls: type) -> tuple[type, tuple[str, ...]]:
    kinds: list[str] = []
    for base in cls.__mro__:
        if "_fasttune_kind" in base.__dict__:
            kinds.append(base.__dict__["_fasttune_kind"])
            cls = base.__dict__["_fasttune_original"]
    return cls, tuple(reversed(kinds))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before any swap."""
    return cast("type[nn.Module]", _history(type(module))[0])


def _rebuild(root: type[nn.Module], kinds: tuple[str, ...]) -> nn.Module:
    # Importing the engine registers the kinds, also where a pickle is the first thing loaded.
    from fasttune.patching import engine

    assert engine
    cls = root
    for kind in kinds:
        cls = swapped_class(cls, kind)
    return cls.__new__(cls)

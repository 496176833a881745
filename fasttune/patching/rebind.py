"""Copies of a function that see other globals; the function and its module stay untouched.

Rotary embedding and the attention interface are module-level names that a forward looks up. The
swapped class of one module gets a copy of its forward in which those names stand for ours.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any


def innermost(function: Any) -> types.FunctionType | None:
    """The plain function inside decorators that keep it in ``__wrapped__`` and their closure."""
    while isinstance(function, types.FunctionType):
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is None:
            return function
        if not any(_content(cell) is wrapped for cell in function.__closure__ or ()):
            return None
        function = wrapped
    return None


def global_names(function: Any) -> dict[str, Any]:
    """The globals that the innermost function reads, by name."""
    inner = innermost(function)
    if inner is None:
        return {}
    return {n: inner.__globals__[n] for n in inner.__code__.co_names if n in inner.__globals__}


def with_globals(function: types.FunctionType, changed: Mapping[str, Any]) -> types.FunctionType:
    """A copy of ``function``, decorators included, whose innermost function sees ``changed``."""
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        return _copy(function, {**function.__globals__, **changed}, function.__closure__)
    inner = with_globals(wrapped, changed)
    closure = tuple(
        types.CellType(inner) if _content(cell) is wrapped else cell
        for cell in function.__closure__ or ()
    )
    copy = _copy(function, function.__globals__, closure)
    copy.__dict__["__wrapped__"] = inner
    return copy


def _copy(
    function: types.FunctionType, namespace: dict[str, Any], closure: Any
) -> types.FunctionType:
    copy = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, closure
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    copy.__doc__, copy.__annotations__ = function.__doc__, function.__annotations__
    return copy


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None

"""Launching a kernel at a third of the host time of Triton's own call.

At each call Triton binds the arguments, derives what to specialise on, and formats a key of it as a
string: most of what a small launch costs on the host, and a training step has thousands. Here the
compiled kernel of the last call with the same facts is looked up by those facts themselves. They
are at least as fine as Triton's: integers count by value (Triton: 1, multiples of 16, width),
tensors by dtype and by their address modulo 16.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# The compiled kernel, what it is run with, and its constants in the order of its parameters.
_Entry = tuple[Any, Any, Any, Any, tuple[Any, ...]]
# The number of rows differs from batch to batch, so the table must not grow forever.
_MAX_ENTRIES = 4096
_compiled: dict[tuple[Any, ...], _Entry] = {}


def _by_address(args: tuple[Any, ...], facts: list[Any]) -> list[Any]:
    """The arguments with addresses for tensors: of each tensor that it gets, Triton's launcher asks
    the driver where it lies. ``facts`` gets what a compiled kernel may depend on.
    """
    values = []
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter or isinstance(arg, Tensor):
            address = arg.data_ptr()
            facts.append(arg.dtype)
            facts.append(address & 15)
            values.append(address if arg.is_cuda else arg)  # which Triton refuses
            continue
        if kind is tuple:
            facts.append((len(arg),))  # no other fact is a tuple
            values.append(tuple(_by_address(arg, facts)))
            continue
        if arg is None or kind is int:
            facts.append(arg)
        elif kind is float:  # never specialised on
            facts.append(kind)
        else:  # a bool is not the integer that it equals
            facts.append(kind)
            facts.append(arg)
        values.append(arg)
    return values


class _Recording(threading.local):
    """Who writes down the launches of this thread: ``repeat``."""

    note: Callable[[PreparedLaunch, tuple[Any, ...]], None] | None = None


recording = _Recording()


class PreparedLaunch:
    """A launch whose kernel is chosen, to be called with arguments of the same facts.

    Args:
        entry: None for the interpreter, which takes ``kernel`` and ``constants``.

    Attributes:
        by_address: whether it is called with addresses for tensors.
    """

    __name__ = "launch"  # in the code that torch.fx writes

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        constants: dict[str, Any],
        entry: _Entry | None,
        by_address: bool,
    ) -> None:
        self._kernel, self._grid, self._constants, self._entry = kernel, grid, constants, entry
        self.by_address = by_address

    def __call__(self, args: tuple[Any, ...], alive: tuple[Tensor, ...] = ()) -> None:
        """``alive``: the tensors of the addresses, which must not be freed before the launch."""
        if self._entry is None:
            self._kernel[self._grid](*args, **self._constants)
        else:
            _run(self._entry, driver.active.get_current_device(), self._grid, args)


def _is_watched() -> bool:
    """Whether somebody, such as a profiler, has a hook on Triton's launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, on the current device and stream.

    Args:
        kernel: a function of ``triton.jit``, or what the interpreter puts in its place.
        grid: one to three numbers of programs.
        args: of every parameter that is no constant, in order: tensors, numbers, None, or tuples of
            them.
        constants: of every constexpr parameter, and Triton's options.

    Raises:
        TypeError: a parameter is missing, or one that is no constant is given by name: it would
            become part of the key.
    """
    note = recording.note
    if note is None:
        _launch(kernel, grid, args, constants)
        return
    with torch._C.DisableTorchFunction():
        entry = _launch(kernel, grid, args, constants)
        by_address = entry is not None and _on_gpu(args)
    note(PreparedLaunch(kernel, grid, constants, entry, by_address), args)


def _on_gpu(args: tuple[Any, ...]) -> bool:
    """Whether all tensors are."""
    return all(
        _on_gpu(arg) if isinstance(arg, tuple) else not isinstance(arg, Tensor) or arg.is_cuda
        for arg in args
    )


def _launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
) -> _Entry | None:
    if not isinstance(kernel, JITFunction):
        kernel[grid](*args, **constants)
        return None
    device = driver.active.get_current_device()
    facts: list[Any] = [id(kernel), device, *constants, *constants.values()]
    values = _by_address(args, facts)
    key = tuple(facts)
    found = _compiled.get(key)
    if found is not None:
        _run(found, device, grid, values)
        return found
    # A compiled kernel takes all parameters in order, constants too.
    others = kernel.params[len(args) :]
    wrong = [p.name for p in others if not p.is_constexpr or p.name not in constants]
    if wrong:
        raise TypeError(f"launch: expected constants for the parameters after args, not {wrong}")
    compiled = kernel[grid](*args, **constants)
    if len(_compiled) >= _MAX_ENTRIES:
        _compiled.clear()
    rest = tuple(constants[p.name] for p in others)
    entry = compiled, compiled.run, compiled.function, compiled.packed_metadata, rest
    _compiled[key] = entry
    return entry


def _run(entry: _Entry, device: Any, grid: tuple[int, ...], args: Sequence[Any]) -> None:
    compiled, run, function, metadata, rest = entry
    x, y, z = (*grid, 1, 1)[:3]
    if _is_watched():
        compiled[(x, y, z)](*args, *rest)
    else:  # what that does, without what it does for hooks
        stream = driver.active.get_current_stream(device)
        run(x, y, z, stream, function, metadata, None, None, None, *args, *rest)

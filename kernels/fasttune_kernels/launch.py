"""Launching a kernel at a third of the host time of Triton's own call.

At each call Triton binds the arguments, derives what to specialise on, and formats a key of it as a
string: most of what a small launch costs on the host, and a training step has thousands. Here the
compiled kernel of the last call with the same facts is looked up by those facts themselves. They
are at least as fine as Triton's: integers count by value (Triton: 1, multiples of 16, width),
tensors by dtype and by their address modulo 16.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# The number of rows differs from batch to batch, so the table must not grow forever.
_MAX_ENTRIES = 4096
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def _facts(args: tuple[Any, ...]) -> list[Any]:
    """What a compiled kernel may depend on of its arguments."""
    facts: list[Any] = []
    for arg in args:
        kind = type(arg)
        if arg is None or kind is int:
            facts.append(arg)
        elif isinstance(arg, Tensor):
            facts += (arg.dtype, arg.data_ptr() & 15)
        elif kind is tuple:
            facts.append(tuple(_facts(arg)))
        else:  # floats are never specialised on; a bool is not the integer that it equals
            facts += (kind, arg) if kind is not float else (kind,)
    return facts


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
    if not isinstance(kernel, JITFunction):
        kernel[grid](*args, **constants)
        return
    device = driver.active.get_current_device()
    key = (id(kernel), device, *_facts(args), *constants.items())
    found = _compiled.get(key)
    if found is not None:
        compiled, rest = found
        compiled[(*grid, 1, 1)[:3]](*args, *rest)
        return
    # A compiled kernel takes all parameters in order, constants too.
    others = kernel.params[len(args) :]
    wrong = [p.name for p in others if not p.is_constexpr or p.name not in constants]
    if wrong:
        raise TypeError(f"launch: expected constants for the parameters after args, not {wrong}")
    compiled = kernel[grid](*args, **constants)
    if len(_compiled) >= _MAX_ENTRIES:
        _compiled.clear()
    _compiled[key] = (compiled, tuple(constants[p.name] for p in others))

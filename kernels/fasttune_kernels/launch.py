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
from torch.nn import Parameter
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# The number of rows differs from batch to batch, so the table must not grow forever.
_MAX_ENTRIES = 4096
_compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def _add_facts(facts: list[Any], args: tuple[Any, ...]) -> None:
    """What a compiled kernel may depend on of its arguments."""
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter or isinstance(arg, Tensor):
            facts.append(arg.dtype)
            facts.append(arg.data_ptr() & 15)
        elif arg is None or kind is int:
            facts.append(arg)
        elif kind is tuple:
            facts.append((len(arg),))  # no other fact is a tuple
            _add_facts(facts, arg)
        elif kind is float:  # never specialised on
            facts.append(kind)
        else:  # a bool is not the integer that it equals
            facts.append(kind)
            facts.append(arg)


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
    if not isinstance(kernel, JITFunction):
        kernel[grid](*args, **constants)
        return
    active = driver.active
    device = active.get_current_device()
    facts: list[Any] = [id(kernel), device, *constants, *constants.values()]
    _add_facts(facts, args)
    key = tuple(facts)
    found = _compiled.get(key)
    if found is not None:
        compiled, run, function, metadata, rest = found
        if not _is_watched():
            # What compiled[grid] does, without what it does for hooks.
            x, y, z = (*grid, 1, 1)[:3]
            stream = active.get_current_stream(device)
            run(x, y, z, stream, function, metadata, None, None, None, *args, *rest)
        else:
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
    rest = tuple(constants[p.name] for p in others)
    _compiled[key] = (compiled, compiled.run, compiled.function, compiled.packed_metadata, rest)

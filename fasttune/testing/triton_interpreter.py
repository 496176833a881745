"""Run Triton kernels on CPU tensors in Triton's interpreter, with correct bfloat16.

    with interpreted():
        t = lora_down(x, a, ...)          # the real launcher, every program of the grid in turn

Within the block the kernels of `fasttune_kernels` (and any other modules that are named) are run by
the interpreter instead of being compiled. Nothing is set in the environment, so that the same
process can also compile them (`triton_dry_run`). On leaving, everything is put back as it was.

Triton's interpreter computes with numpy, which has no bfloat16: it keeps such values as their bit
patterns in uint16 and adds, negates and sums those as integers, and it truncates where a GPU rounds
to nearest even. Here every bfloat16 operation widens to fp32, computes, and rounds once to nearest
even. Products of fp32 blocks without `input_precision="ieee"` are rounded to tf32 first, as a GPU
does.

What it cannot see: data races, illegal layouts and shapes, resources (see `triton_dry_run`).
Not for use from several threads at once.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

# Triton imports this at its first launch; it refuses to be imported while functions are swapped.
import triton.experimental.gluon  # noqa: F401
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

import fasttune_kernels
from fasttune_kernels import repeat

Array = npt.NDArray[Any]

# Library modules whose functions (tl.sum, tl.zeros, ...) are themselves compiled Triton functions.
_LIBRARY = (tl, tl.core, tl.standard, tl.random, tl.math)
# What the interpreter patches when a kernel calls another one, and does not put back.
_PATCHED = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base, tl.dtype, tl.condition)

# Names that the rewritten source of an interpreted function refers to.
_REWRITER_NAMES = ("interpreter_semantic", "_InterpreterComparison")

# By the Python function: hashing a JITFunction parses everything it calls.
_interpreted_functions: dict[Callable[..., Any], InterpretedFunction[Any]] = {}


def widen_bfloat16(bits: Array) -> Array:
    """uint16 bit patterns of bfloat16 -> the same values in fp32."""
    return np.asarray((bits.astype(np.uint32) << 16).view(np.float32))


def round_to_bfloat16(values: Array) -> Array:
    """fp32 -> uint16 bit patterns of bfloat16, to nearest, ties to even; NaN becomes quiet."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def round_to_tf32(values: Array) -> Array:
    """fp32 -> fp32 with 10 explicit significand bits, to nearest, ties away (`cvt.rna.tf32`)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.asarray(np.where(np.isfinite(values), rounded, values))


def _is_bfloat16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widen(handle: TensorHandle) -> TensorHandle:
    if not _is_bfloat16(handle):
        return handle
    return TensorHandle(widen_bfloat16(handle.data), tl.float32)


def _narrow(data: Array) -> TensorHandle:
    return TensorHandle(round_to_bfloat16(data), tl.bfloat16)


def _to_fp32(data: Array, source: Any) -> Array:
    return widen_bfloat16(data) if source == tl.bfloat16 else data.astype(np.float32)


def _builder_overrides() -> dict[str, Callable[..., Any]]:
    """Replacements for methods of the interpreter's builder, by name."""
    original = {
        name: getattr(InterpreterBuilder, name)
        for name in (
            "binary_op",
            "unary_op",
            "ternary_op",
            "cast_impl",
            "create_fp_to_fp",
            "create_dot",
            "create_fma",
            "create_atomic_rmw",
        )
    }

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if not _is_bfloat16(lhs):
            return original["binary_op"](self, lhs, rhs, op)
        output = op(_widen(lhs).data, _widen(rhs).data)
        # A comparison gives booleans; arithmetic rounds once.
        return TensorHandle(output, tl.int1) if output.dtype == bool else _narrow(output)

    def unary_op(self: Any, arg: TensorHandle, op: Any) -> TensorHandle:
        if not _is_bfloat16(arg):
            return original["unary_op"](self, arg, op)
        return _narrow(op(_widen(arg).data))

    def ternary_op(self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, op: Any) -> Any:
        # Selection moves bit patterns and is right as it is; clamping compares values.
        if op is np.where or not _is_bfloat16(c):
            return original["ternary_op"](self, a, b, c, op)
        return _narrow(op(_widen(a).data, _widen(b).data, _widen(c).data))

    def cast_impl(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        source_type, target_type = source.dtype.scalar, target.scalar
        if tl.bfloat16 not in (source_type, target_type) or source_type == target_type:
            return original["cast_impl"](self, source, target)
        values = _to_fp32(source.data, source_type)
        if target_type == tl.bfloat16:
            return _narrow(values)
        wide = TensorHandle(values, tl.float32)
        return wide if target_type == tl.float32 else original["cast_impl"](self, wide, target)

    def create_fp_to_fp(self: Any, source: TensorHandle, target: Any, mode: Any) -> TensorHandle:
        types = (source.dtype.scalar, target.scalar)
        if tl.bfloat16 not in types or any(t.primitive_bitwidth == 8 for t in types):
            return original["create_fp_to_fp"](self, source, target, mode)
        if mode not in (None, ir.ROUNDING_MODE.RTNE):
            raise NotImplementedError("bfloat16 conversion that does not round to nearest even")
        return cast_impl(self, source, target)

    def create_dot(
        self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, inexact: Any
    ) -> TensorHandle:
        a, b = _widen(a), _widen(b)
        if a.data.dtype == np.float32 and precision == ir.INPUT_PRECISION.TF32:
            a = TensorHandle(round_to_tf32(a.data), tl.float32)
            b = TensorHandle(round_to_tf32(b.data), tl.float32)
        return original["create_dot"](self, a, b, d, precision, inexact)

    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not _is_bfloat16(z):
            return original["create_fma"](self, x, y, z)
        # The product of two bfloat16 is exact in fp64 and the sum has more bits than any tie needs.
        wide = [_widen(handle).data.astype(np.float64) for handle in (x, y, z)]
        return _narrow(_round_to_odd_fp32(wide[0] * wide[1] + wide[2]))

    def create_atomic_rmw(
        self: Any, op: Any, ptr: TensorHandle, value: TensorHandle, *rest: Any
    ) -> TensorHandle:
        if _is_bfloat16(value):
            raise NotImplementedError("bfloat16 atomics in the interpreter")
        return original["create_atomic_rmw"](self, op, ptr, value, *rest)

    overrides = (
        binary_op,
        unary_op,
        ternary_op,
        cast_impl,
        create_fp_to_fp,
        create_dot,
        create_fma,
        create_atomic_rmw,
    )
    return {override.__name__: override for override in overrides}


def _round_to_odd_fp32(values: Array) -> Array:
    """fp64 -> fp32 such that a further rounding to bfloat16 equals rounding once from fp64."""
    nearest = values.astype(np.float32)
    toward_zero = np.where(
        np.abs(nearest.astype(np.float64)) > np.abs(values),
        np.nextafter(nearest, np.float32(0)),
        nearest,
    )
    inexact = np.isfinite(nearest) & (toward_zero.astype(np.float64) != values)
    bits = toward_zero.view(np.uint32) | inexact.astype(np.uint32)
    return np.asarray(bits.view(np.float32))


def _bfloat16_reductions() -> dict[tuple[type, str], Callable[..., Any]]:
    """Replacements for the reductions that numpy would do on bit patterns."""
    reduce_ops, scan_ops = triton_interpreter.ReduceOps, triton_interpreter.ScanOps
    overrides: dict[tuple[type, str], Callable[..., Any]] = {}

    def through_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
        def reduce(self: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            if value.dtype != tl.bfloat16:
                return original(self, value, *args, **kwargs)
            wide = tl.tensor(_widen(value.handle), _with_element(value.type, tl.float32))
            return _map_tensors(original(self, wide, *args, **kwargs), _narrow_tensor)

        return reduce

    for owner, name in (
        (reduce_ops, "sum"),
        (reduce_ops, "min_max"),
        (scan_ops, "cumsum"),
        (scan_ops, "cumprod"),
    ):
        overrides[owner, name] = through_fp32(getattr(owner, name))
    return overrides


def _with_element(block: Any, element: Any) -> Any:
    return block.with_element_ty(element) if block.is_block() else element


def _narrow_tensor(value: Any) -> Any:
    if value.dtype != tl.float32:
        return value  # an index
    return tl.tensor(_narrow(value.handle.data), _with_element(value.type, tl.bfloat16))


def _map_tensors(values: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(values, (list, tuple)):
        return type(values)(function(value) for value in values)
    return function(values)


def _call_device_function(self: InterpretedFunction[Any], *args: Any, **kwargs: Any) -> Any:
    """Replaces `InterpretedFunction.__call__`, which patches the language anew at every call.

    Patching walks all of `triton.language` and takes longer than a small kernel; once suffices.
    """
    languages = [m for m in (tl, tl.core) if any(v is m for v in self.fn.__globals__.values())]
    if any(tl.core.is_builtin(language.load) for language in languages):
        triton_interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _kernel_modules() -> list[ModuleType]:
    return [
        importlib.import_module(f"{fasttune_kernels.__name__}.{info.name}")
        for info in pkgutil.iter_modules(fasttune_kernels.__path__)
    ]


def _as_interpreted(function: JITFunction[Any]) -> InterpretedFunction[Any]:
    if function.fn not in _interpreted_functions:
        _interpreted_functions[function.fn] = InterpretedFunction(function.fn)
    return _interpreted_functions[function.fn]


@contextlib.contextmanager
def interpreted(*modules: ModuleType) -> Iterator[None]:
    """Run the Triton kernels of `fasttune_kernels` and of `modules` in the interpreter.

    A kernel is replaced where a module refers to it by name, so calls must look it up in its
    module, as launchers do; a kernel taken from a module before the block is still the compiled
    one. Blocks may be nested.
    """
    if _is_interpreting():
        with _swapped(modules):
            yield
        return
    repeat.forget()  # before: what the block finds is put back as it was
    try:
        with _swapped(modules):
            yield
    finally:
        repeat.forget()


def _is_interpreting() -> bool:
    return getattr(InterpreterBuilder, "_fasttune_bfloat16", False)


@contextlib.contextmanager
def _swapped(modules: tuple[ModuleType, ...]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        # Everything is saved before anything is changed.
        changed = {*_LIBRARY, *_kernel_modules(), *modules}
        for owner in {*_PATCHED, *changed}:
            stack.callback(_restore, owner, dict(vars(owner)))
        for module in changed:
            for name in _REWRITER_NAMES:
                setattr(module, name, getattr(triton_interpreter, name))
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    setattr(module, name, _as_interpreted(value))
        if not _is_interpreting():
            _swap(stack, InterpreterBuilder, "_fasttune_bfloat16", True)
            for name, override in _builder_overrides().items():
                _swap(stack, InterpreterBuilder, name, override)
            for (owner, name), override in _bfloat16_reductions().items():
                _swap(stack, owner, name, override)
            _swap(stack, InterpretedFunction, "__call__", _call_device_function)
        yield


_ABSENT = object()


def _swap(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    previous = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    if previous is _ABSENT:
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, previous)


def _restore(owner: Any, before: dict[str, Any]) -> None:
    for name, value in list(vars(owner).items()):
        if name not in before:
            delattr(owner, name)
        elif before[name] is not value:
            setattr(owner, name, before[name])

"""Why a kernel tier cannot take the arguments of a call: one answer for every op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from types import ModuleType
from typing import Any

from torch import Tensor

from fasttune import _native
from fasttune._registry import Op
from fasttune.ops import _triton
from fasttune.ops._arguments import KERNEL_DTYPES


def why_not_cpu(args: Sequence[Any], a: Sequence[Tensor]) -> str | None:
    """Why the C++ kernels cannot take ``args``, whose LoRA factors A are ``a``, or None."""
    missing = _native.cpu_missing()
    if missing is not None:
        return missing
    tensors = _flatten(args)
    for tensor in tensors:  # at every call of an op: no generator
        if not tensor.is_cpu:
            return "it takes CPU tensors"
    return _dtype_or_rank(tensors, a, _native.MAX_RANK)


def why_not_triton(args: Sequence[Any], a: Sequence[Tensor]) -> str | None:
    """Why the Triton kernels cannot take ``args``, whose LoRA factors A are ``a``, or None."""
    tensors = _flatten(args)
    return _triton.why_not(tensors) or _dtype_or_rank(tensors, a, _triton.MAX_RANK)


def why_not_cuda(args: Sequence[Any]) -> str | None:
    """Why the CUDA C++ kernels cannot take ``args``, or None."""
    tensors = _flatten(args)
    if not _native.cuda_emulated():
        missing = _native.cuda_missing()
        if missing is not None:
            return missing
        if any(tensor.device.type != "cuda" for tensor in tensors):
            return "it takes CUDA tensors"
    return _dtype_or_rank(tensors, (), 0)


def never(*args: Any) -> str | None:
    """The reference takes everything."""
    return None


def register_lora_backends(
    forward: Op,
    backward: Op,
    forward_with: Callable[..., Any],
    backward_with: Callable[..., Any],
    reference: ModuleType,
    *,
    repeated: bool = True,
) -> None:
    """The backends of an op that is made of the primitives of a LoRA branch.

    Args:
        forward, backward: the ops; A, a tensor or several, is argument 3 of both.
        forward_with, backward_with: take the module of a backend's primitives, then the op's
            arguments.
        reference: a module with ``forward`` and ``backward`` in plain torch.
        repeated: whether Triton's launches follow from the facts about the arguments alone.
    """
    for op, run, plain in (
        (forward, forward_with, reference.forward),
        (backward, backward_with, reference.backward),
    ):
        op.backend("cpu", _lora_on_cpu)(partial(run, _native))
        with_triton = partial(_with_triton, run)
        op.backend("triton", _lora_on_triton)(Repeated(with_triton) if repeated else with_triton)
        op.backend("reference", never)(plain)


class Repeated:
    """``fasttune_kernels.repeat.Repeated`` of a function; triton is imported at the first call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @cached_property
    def _repeated(self) -> Any:
        return _triton.kernels("repeat").Repeated(self._function)

    def __call__(self, *args: Any) -> Any:
        return self._repeated(*args)


def _with_triton(run: Callable[..., Any], *args: Any) -> Any:
    return run(_triton.kernels("lora_linear"), *args)  # triton is imported at the first call


def _lora_on_cpu(*args: Any) -> str | None:
    return why_not_cpu(args, _flatten([args[3]]))


def _lora_on_triton(*args: Any) -> str | None:
    return why_not_triton(args, _flatten([args[3]]))


_NUMBERS = (int, float, bool)


def _flatten(args: Sequence[Any]) -> list[Tensor]:
    flat: list[Tensor] = []
    for arg in args:
        kind = type(arg)
        if kind is list or kind is tuple:
            if arg and type(arg[0]) not in _NUMBERS:
                flat += [item for item in arg if isinstance(item, Tensor)]
        elif isinstance(arg, Tensor):
            flat.append(arg)
    return flat


def _dtype_or_rank(tensors: Sequence[Tensor], a: Sequence[Tensor], max_rank: int) -> str | None:
    for tensor in tensors:
        if tensor.dtype not in KERNEL_DTYPES and tensor.is_floating_point():
            return f"it takes fp32, bf16 and fp16, got {tensor.dtype}"
    for factor in a:
        if factor.shape[0] > max_rank:
            return f"it takes ranks up to {max_rank}, got {factor.shape[0]}"
    return None

"""Checks of public arguments, and the dtypes that kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttune import _torch

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOATS = (*KERNEL_DTYPES, torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of products in ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_float(name: str, tensor: Any) -> None:
    """Raises TypeError unless ``tensor`` is a tensor of a float dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected fp32, bf16, fp16 or fp64, got {tensor.dtype}")


def rows_first(x: Tensor, rows: int, width: int) -> Tensor:
    """x as [rows, width] with unit column stride; one that lies otherwise is copied."""
    # A view that torch would negate as it reads, which no kernel does.
    if not torch.compiler.is_compiling() and x.is_neg():
        x = x.resolve_neg()
    if x.dim() != 2:
        x = x.reshape(rows, width)
    return x if width == 1 or x.stride(1) == 1 else x.contiguous()


def output_shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """y, the contiguous output of a Function, in ``shape``.

    No view: ``y *= s`` on an output must work, and autograd forbids it on a view that was made in
    a Function.
    """
    if y.shape == shape:
        return y
    own = y.is_contiguous() and y._base is None and not y.requires_grad
    # A dispatch mode (selective checkpointing, tracing) would see its cached tensor change.
    if own and not torch.compiler.is_compiling() and not _torch.under_dispatch_mode():
        return y.resize_(shape)  # of as many elements: half the time of the operator below
    shaped: Tensor = torch.ops.aten._unsafe_view.default(y, shape)
    return shaped


def _fits(got: torch.Size, wanted: tuple[int | None, ...]) -> bool:
    if len(got) != len(wanted):
        return False
    for i, size in enumerate(wanted):  # noqa: SIM110, at every call of an op: no generator
        if size is not None and size != got[i]:
            return False
    return True


def check_shape(
    name: str,
    tensor: Any,
    shape: tuple[int | None, ...],
    device: torch.device,
    *,
    like: str = "x",
) -> None:
    """Raises unless ``tensor`` is a float tensor of ``shape`` on ``device``, that of ``like``."""
    check_float(name, tensor)
    if not _fits(tensor.shape, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} as {like}, got {tensor.device}")

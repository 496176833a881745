"""The tolerance rule of the project and other numerical checks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# A kernel makes as many roundings as torch, in another order: two samples of one distribution.
FACTOR = 2.0


def largest_error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth|, computed in fp64; infinity if value has a NaN that truth has not."""
    if value.shape != truth.shape:
        raise AssertionError(f"shape {tuple(value.shape)}, expected {tuple(truth.shape)}")
    if value.numel() == 0:
        return 0.0
    difference = (value.double() - truth.double()).abs()
    return float(difference.nan_to_num(nan=float("inf")).max())


def floor_of(truth: Tensor, dtype: torch.dtype) -> float:
    """Two units in the last place of the largest true value in ``dtype``.

    A result is rounded once or twice at the end, and torch's own error may happen to be zero. In
    fp64 the truth itself carries the rounding of its sums: sixteen units there.
    """
    units = 16 if dtype == torch.float64 else 2
    return units * torch.finfo(dtype).eps * float(truth.abs().max()) if truth.numel() else 0.0


def check(name: str, value: Tensor, stock: Tensor, truth: Tensor, floor: float = 0.0) -> None:
    """Assert |value - truth| <= FACTOR |stock - truth| + floor, with maxima over the elements.

    Args:
        name: of the tensor, for the message.
        value: the kernel's result.
        stock: torch's result in the same dtypes.
        truth: the fp64 result.
        floor: what the caller derived beyond :func:`floor_of`, absolute.
    """
    error, reference = largest_error(value, truth), largest_error(stock, truth)
    allowed = FACTOR * reference + floor_of(truth, value.dtype) + floor
    assert error <= allowed, (
        f"{name}: error {error:.3e}, allowed {allowed:.3e} (torch {reference:.3e})"
    )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN inside, so that an output that is not fully written shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic  # a module with a property
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        settings.fill_uninitialized_memory = fill

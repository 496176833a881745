"""What the norms share: rows in and out, checks of arguments, what a tier cannot take."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fasttune.ops import _support
from fasttune.ops._arguments import check_float, check_shape, rows_first

# The longest row that one Triton program holds (fasttune_kernels.rms_norm.MAX_FEATURES).
MAX_TRITON_FEATURES = 16384


def as_rows(x: Tensor) -> Tensor:
    """x [*, H] as [M, H] with unit column stride; one that lies otherwise is copied."""
    return rows_first(x, math.prod(x.shape[:-1]), x.shape[-1])


def dense(vector: Tensor | None) -> Tensor | None:
    """vector [H] with unit stride, as the kernels take it."""
    return None if vector is None else vector.contiguous()


def cpu_supports(*args: Any) -> str | None:
    """Why the C++ kernels cannot take ``args``, or None."""
    return _support.why_not_cpu(args, ())


def triton_supports(*args: Any) -> str | None:
    """Why the Triton kernels cannot take ``args``, whose first is [M, H], or None."""
    features = args[0].shape[1]
    if features > MAX_TRITON_FEATURES:
        return f"it takes up to {MAX_TRITON_FEATURES} features, got {features}"
    return _support.why_not_triton(args, ())


def validate(x: Tensor, eps: float, residual: Tensor | None, **vectors: Tensor | None) -> None:
    """Raises unless x is [*, H], residual is like it, the named vectors are [H] and eps a number.

    ``residual`` is x itself where the op has none.
    """
    check_float("x", x)
    if x.dim() < 1:
        raise ValueError(f"x: expected at least one dimension [*, H], got shape {list(x.shape)}")
    if residual is not x:
        check_shape("residual", residual, tuple(x.shape), x.device)
    for name, vector in vectors.items():
        if vector is not None:
            check_shape(name, vector, (x.shape[-1],), x.device)
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")

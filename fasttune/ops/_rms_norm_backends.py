"""The registered ops of rms_norm: schema, fake and one implementation per backend."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fasttune import _native, _registry
from fasttune._native import rms_norm_cuda
from fasttune.ops import _rms_norm_reference, _support, _triton
from fasttune.ops._arguments import accumulator
from fasttune.ops._norms import cpu_supports, dense, triton_supports


def _forward_fake(x: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=rest[-1])
    return y, x.new_empty(x.shape[0], dtype=accumulator(x.dtype))


def _add_forward_fake(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _forward_fake(x, *rest)
    return y, x.new_empty(x.shape), rstd


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    addend: Tensor | None,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
) -> list[Tensor]:
    grads = [x.new_empty(x.shape)] if need_dx else []
    return grads + ([rstd.new_empty(x.shape[1])] if need_dweight else [])


_FACTS = "float eps, float weight_offset, bool round_first, ScalarType out_dtype"

FORWARD = _registry.define(
    "rms_norm_fwd", f"(Tensor x, Tensor? weight, {_FACTS}) -> (Tensor, Tensor)", _forward_fake
)
ADD_FORWARD = _registry.define(
    "add_rms_norm_fwd",
    f"(Tensor x, Tensor residual, Tensor? weight, {_FACTS}) -> (Tensor, Tensor, Tensor)",
    _add_forward_fake,
)
BACKWARD = _registry.define(
    "rms_norm_bwd",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, Tensor? addend, float weight_offset, "
    "bool need_dx, bool need_dweight) -> Tensor[]",
    _backward_fake,
)


def _forward_with(
    kernels: ModuleType,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    y, rstd = kernels.rms_norm_forward(
        x,
        dense(weight),
        eps=eps,
        weight_offset=weight_offset,
        round_first=round_first,
        out_dtype=out_dtype,
    )
    return y, rstd


def _add_forward_with(
    kernels: ModuleType,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    y, s, rstd = kernels.add_rms_norm_forward(
        x,
        residual,
        dense(weight),
        eps=eps,
        weight_offset=weight_offset,
        round_first=round_first,
        out_dtype=out_dtype,
    )
    return y, s, rstd


def _backward_with(
    kernels: ModuleType,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    addend: Tensor | None,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
) -> list[Tensor]:
    grads = kernels.rms_norm_backward(
        dy,
        x,
        dense(weight),
        rstd,
        addend,
        weight_offset=weight_offset,
        need_dx=need_dx,
        need_dweight=need_dweight,
    )
    return [grad for grad in grads if grad is not None]


def _fwd_cuda_supports(x: Tensor, weight: Tensor | None, *facts: Any) -> str | None:
    missing = _support.why_not_cuda((x, weight))
    return missing or _other_dtype(x, ("weight", weight), ("output", facts[-1]))


def _add_fwd_cuda_supports(x: Tensor, residual: Tensor, *rest: Any) -> str | None:
    if residual.dtype != x.dtype:
        return f"it takes a residual in x's {x.dtype}, got {residual.dtype}"
    return _support.why_not_cuda((residual,)) or _fwd_cuda_supports(x, *rest)


def _bwd_cuda_supports(dy: Tensor, x: Tensor, weight: Tensor | None, *rest: Any) -> str | None:
    missing = _support.why_not_cuda((dy, x, weight, *rest))
    return missing or _other_dtype(x, ("dy", dy), ("weight", weight))


def _other_dtype(x: Tensor, *others: tuple[str, Any]) -> str | None:
    """Why the CUDA C++ kernels cannot take the named tensors or dtypes with x, or None."""
    for name, other in others:
        dtype = other.dtype if isinstance(other, Tensor) else other
        if dtype not in (None, x.dtype, torch.float32):
            return f"it takes {name} in x's {x.dtype} or fp32, got {dtype}"
    return None


@FORWARD.backend("cpu", cpu_supports)
def _fwd_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    return _forward_with(_native, *args)


@ADD_FORWARD.backend("cpu", cpu_supports)
def _add_fwd_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _add_forward_with(_native, *args)


@BACKWARD.backend("cpu", cpu_supports)
def _bwd_cpu(*args: Any) -> list[Tensor]:
    return _backward_with(_native, *args)


@FORWARD.backend("triton", triton_supports)
@_support.Repeated
def _fwd_triton(*args: Any) -> tuple[Tensor, Tensor]:
    return _forward_with(_triton.kernels("rms_norm"), *args)


@ADD_FORWARD.backend("triton", triton_supports)
@_support.Repeated
def _add_fwd_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _add_forward_with(_triton.kernels("rms_norm"), *args)


@BACKWARD.backend("triton", triton_supports)
@_support.Repeated
def _bwd_triton(*args: Any) -> list[Tensor]:
    return _backward_with(_triton.kernels("rms_norm"), *args)


@FORWARD.backend("cuda", _fwd_cuda_supports)
def _fwd_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return _forward_with(rms_norm_cuda, *args)


@ADD_FORWARD.backend("cuda", _add_fwd_cuda_supports)
def _add_fwd_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _add_forward_with(rms_norm_cuda, *args)


@BACKWARD.backend("cuda", _bwd_cuda_supports)
def _bwd_cuda(*args: Any) -> list[Tensor]:
    return _backward_with(rms_norm_cuda, *args)


FORWARD.backend("reference", _support.never)(_rms_norm_reference.forward)
ADD_FORWARD.backend("reference", _support.never)(_rms_norm_reference.add_forward)
BACKWARD.backend("reference", _support.never)(_rms_norm_reference.backward)

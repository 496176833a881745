"""The registered ops of layer_norm: schema, fake and one implementation per backend."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fasttune import _native, _registry
from fasttune.ops import _layer_norm_reference, _support, _triton
from fasttune.ops._arguments import accumulator
from fasttune.ops._norms import cpu_supports, dense, triton_supports


def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], dtype=accumulator(x.dtype)) for _ in range(2))
    return x.new_empty(x.shape, dtype=rest[-1]), mean, rstd


def _add_forward_fake(
    x: Tensor, residual: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, rstd = _forward_fake(x, *rest)
    return y, x.new_empty(x.shape), mean, rstd


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    addend: Tensor | None,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> list[Tensor]:
    grads = [x.new_empty(x.shape)] if need_dx else []
    wanted = need_dweight + need_dbias
    return grads + [rstd.new_empty(x.shape[1]) for _ in range(wanted)]


_VECTORS = "Tensor? weight, Tensor? bias"
_FACTS = "float eps, float weight_offset, ScalarType out_dtype"

FORWARD = _registry.define(
    "layer_norm_fwd", f"(Tensor x, {_VECTORS}, {_FACTS}) -> (Tensor, Tensor, Tensor)", _forward_fake
)
ADD_FORWARD = _registry.define(
    "add_layer_norm_fwd",
    f"(Tensor x, Tensor residual, {_VECTORS}, {_FACTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _add_forward_fake,
)
BACKWARD = _registry.define(
    "layer_norm_bwd",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor? addend, "
    "float weight_offset, bool need_dx, bool need_dweight, bool need_dbias) -> Tensor[]",
    _backward_fake,
)


def _forward_with(
    kernels: ModuleType,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = kernels.layer_norm_forward(
        x, dense(weight), dense(bias), eps=eps, weight_offset=weight_offset, out_dtype=out_dtype
    )
    return y, mean, rstd


def _add_forward_with(
    kernels: ModuleType,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, s, mean, rstd = kernels.add_layer_norm_forward(
        x,
        residual,
        dense(weight),
        dense(bias),
        eps=eps,
        weight_offset=weight_offset,
        out_dtype=out_dtype,
    )
    return y, s, mean, rstd


def _backward_with(
    kernels: ModuleType,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    addend: Tensor | None,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> list[Tensor]:
    grads = kernels.layer_norm_backward(
        dy,
        x,
        dense(weight),
        mean,
        rstd,
        addend,
        weight_offset=weight_offset,
        need_dx=need_dx,
        need_dweight=need_dweight,
        need_dbias=need_dbias,
    )
    return [grad for grad in grads if grad is not None]


@FORWARD.backend("cpu", cpu_supports)
def _fwd_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_with(_native, *args)


@ADD_FORWARD.backend("cpu", cpu_supports)
def _add_fwd_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _add_forward_with(_native, *args)


@BACKWARD.backend("cpu", cpu_supports)
def _bwd_cpu(*args: Any) -> list[Tensor]:
    return _backward_with(_native, *args)


@FORWARD.backend("triton", triton_supports)
@_support.Repeated
def _fwd_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_with(_triton.kernels("layer_norm"), *args)


@ADD_FORWARD.backend("triton", triton_supports)
@_support.Repeated
def _add_fwd_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _add_forward_with(_triton.kernels("layer_norm"), *args)


@BACKWARD.backend("triton", triton_supports)
@_support.Repeated
def _bwd_triton(*args: Any) -> list[Tensor]:
    return _backward_with(_triton.kernels("layer_norm"), *args)


FORWARD.backend("reference", _support.never)(_layer_norm_reference.forward)
ADD_FORWARD.backend("reference", _support.never)(_layer_norm_reference.add_forward)
BACKWARD.backend("reference", _support.never)(_layer_norm_reference.backward)

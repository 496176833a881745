"""bias_activation: an activation with the bias of the product before it, y = act(x + bias).

Maths, over [M, N], with the activations and slopes that glu.py states:

    z = x + bias
    y = act(z)
    dx = dz = dy act'(z),   dbias = sum_m dz

Saved for backward: x and bias as they came; z is computed again. y is rebuilt from them for a
consumer's backward (_recipe.py).

Precision: fp32 throughout; z is never rounded. y is rounded once to promote_types(x, bias), dx once
to x's dtype. dbias adds dz in fp32 in an order that the shape fixes, and is returned in bias's
dtype; the kernels add dz as rounded to the dtype of y, as torch does.

Semantics: transformers.models.gpt2.modeling_gpt2.GPT2MLP.forward (5.24) between its products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fasttune import _native, _registry, _torch
from fasttune._native import elementwise_cuda
from fasttune.ops import _recipe, _support, _triton
from fasttune.ops._activations import ACTIVATIONS, check_activation
from fasttune.ops._arguments import accumulator, check_float, check_shape, output_shaped, rows_first


def _output_dtype(x: Tensor, bias: Tensor | None) -> torch.dtype:
    return x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)


def _forward_fake(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(x.shape, dtype=_output_dtype(x, bias))


def _backward_fake(
    dy: Tensor, x: Tensor, bias: Tensor | None, activation: str, needs: Sequence[bool]
) -> list[Tensor]:
    grads = [x.new_empty(x.shape)] if needs[0] else []
    if needs[1]:
        grads.append(x.new_empty(x.shape[1], dtype=accumulator(dy.dtype)))
    return grads


FORWARD = _registry.define(
    "bias_activation_fwd", "(Tensor x, Tensor? bias, str activation) -> Tensor", _forward_fake
)
BACKWARD = _registry.define(
    "bias_activation_bwd",
    "(Tensor dy, Tensor x, Tensor? bias, str activation, bool[] needs) -> Tensor[]",
    _backward_fake,
)


def _formula(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    dtype = _output_dtype(x, bias)
    return ACTIVATIONS[activation].value(_biased(x, bias, accumulator(dtype))).to(dtype)


def _biased(x: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    return x.to(wide) if bias is None else x.to(wide) + bias.to(wide)


def _backward_reference(
    dy: Tensor, x: Tensor, bias: Tensor | None, activation: str, needs: Sequence[bool]
) -> list[Tensor]:
    wide = accumulator(dy.dtype)
    dz = dy.to(wide) * ACTIVATIONS[activation].slope(_biased(x, bias, wide))
    grads = [dz.to(x.dtype)] if needs[0] else []
    return [*grads, dz.sum(0)] if needs[1] else grads


def _forward_with(prims: ModuleType, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    y: Tensor = prims.bias_activation_forward(x, bias, activation=activation)
    return y


def _backward_with(
    prims: ModuleType,
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    # A trained bias sees dz in the dtype of y, which may be wider than that of x.
    dtype = dy.dtype if needs[1] else x.dtype
    dz = prims.bias_activation_backward(dy, x, bias, activation=activation, dx_dtype=dtype)
    grads = [dz.to(x.dtype)] if needs[0] else []
    return [*grads, prims.column_sum(dz)] if needs[1] else grads


def _cpu_supports(*args: Any) -> str | None:
    return _support.why_not_cpu(args, ())


def _triton_supports(*args: Any) -> str | None:
    return _support.why_not_triton(args, ())


def _cuda_supports(*args: Any) -> str | None:
    return _support.why_not_cuda(args)


@FORWARD.backend("cpu", _cpu_supports)
def _fwd_cpu(*args: Any) -> Tensor:
    return _forward_with(_native, *args)


@BACKWARD.backend("cpu", _cpu_supports)
def _bwd_cpu(*args: Any) -> list[Tensor]:
    return _backward_with(_native, *args)


@FORWARD.backend("triton", _triton_supports)
@_support.Repeated
def _fwd_triton(*args: Any) -> Tensor:
    return _forward_with(_triton.kernels("bias_activation"), *args)


@BACKWARD.backend("triton", _triton_supports)
@_support.Repeated
def _bwd_triton(*args: Any) -> list[Tensor]:
    return _backward_with(_triton.kernels("bias_activation"), *args)


@FORWARD.backend("cuda", _cuda_supports)
def _fwd_cuda(*args: Any) -> Tensor:
    return _forward_with(elementwise_cuda, *args)


@BACKWARD.backend("cuda", _cuda_supports)
def _bwd_cuda(*args: Any) -> list[Tensor]:
    return _backward_with(elementwise_cuda, *args)


FORWARD.backend("reference", _support.never)(_formula)
BACKWARD.backend("reference", _support.never)(_backward_reference)


class _BiasActivation(_recipe.Producer, torch.autograd.Function):
    """x [*, N] and bias [N] or None to y [*, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        args = (_as_rows(x), bias, activation)
        if _registry.must_dispatch((x, bias)):
            ctx.backend = None
            y = FORWARD.registered(*args)
        else:
            ctx.backend = FORWARD.select(*args)
            y = ctx.backend.run(*args)
        ctx.save_for_backward(x, bias)
        ctx.set_materialize_grads(False)
        ctx.saved_bytes = x.nbytes
        ctx.rebuildable = ctx.backend is not None or _recipe.possible((x, bias))
        ctx.activation, ctx.needs = activation, list(ctx.needs_input_grad[:2])
        return output_shaped(y, x.shape)

    @staticmethod
    def rebuild(node: Any, saved: tuple[Any, ...]) -> Tensor:
        x, bias = saved
        y = _recipe.forward_again(node, FORWARD, _as_rows(x), bias, node.activation)
        return output_shaped(y, x.shape)

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        x, bias = _recipe.saved(ctx, last=True)
        if dy is None:
            return None, None, None
        rows = _as_rows(x)
        run = (
            BACKWARD.registered if ctx.backend is None else BACKWARD.backends[ctx.backend.name].run
        )
        grads = iter(run(rows_first(dy, *rows.shape), rows, bias, ctx.activation, ctx.needs))
        dx = next(grads).view(x.shape) if ctx.needs[0] else None
        dbias = next(grads).to(bias.dtype) if ctx.needs[1] else None
        return dx, dbias, None


def _as_rows(x: Tensor) -> Tensor:
    """[*, N] as [M, N]."""
    return rows_first(x, math.prod(x.shape[:-1]), x.shape[-1])


def bias_activation(
    x: Tensor,  # [*, N]
    bias: Tensor | None = None,  # [N]
    *,
    activation: str,
) -> Tensor:
    """act(x + bias), [*, N].

    Args:
        x: fp32, bf16, fp16 (fp64 on the reference backend), any leading shape, also empty.
        bias: [N] on the device of x, any of those dtypes; None for none.
        activation: silu, gelu, gelu_tanh, quick_gelu, relu, relu2, tanh, sigmoid or leaky_relu.

    Returns:
        [*, N] in ``torch.promote_types(x.dtype, bias.dtype)``, also under autocast.

    Raises:
        TypeError: an argument is no tensor or has no float dtype, or activation is no string.
        ValueError: shapes or devices do not fit, or there is no such activation.

    Semantics: ``torch.nn.functional`` of x + bias; :mod:`fasttune.ops.glu` states the formulas.
    """
    check_activation(activation)
    check_float("x", x)
    if x.dim() < 1:
        raise ValueError(f"x: expected at least one dimension [*, N], got shape {tuple(x.shape)}")
    if bias is not None:
        check_shape("bias", bias, (x.shape[-1],), x.device)
    return apply_bias_activation(x, bias, activation)


def apply_bias_activation(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """:func:`bias_activation` without validation, for callers that know their arguments."""
    if _torch.in_functorch():  # plain torch operations compose with vmap and grad
        return _formula(x, bias, activation)
    y: Tensor = _BiasActivation.apply(x, bias, activation)  # type: ignore[no-untyped-call]
    return y

"""glu: the gated activation of an MLP, y = act(gate) * up.

Maths, elementwise over [M, I]:

    y = act(g) u
    dg = dy u act'(g),   du = dy act(g)

with the activations and their slopes, where s is the logistic function, Phi the normal distribution
and phi its density:

    silu         x s(x)                      s(x) + x s(x) s(-x)
    gelu         x Phi(x)                    Phi(x) + x phi(x)
    gelu_tanh    x (1 + tanh z) / 2          s(2z) + x s(2z) s(-2z) 2z'
                 = x s(2z)                   z = sqrt(2 / pi) (x + 0.044715 x^3)
    quick_gelu   x s(1.702 x)                s(1.702 x) + 1.702 x s(1.702 x) s(-1.702 x)
    relu         max(x, 0)                   1 where x > 0, else 0
    relu2        max(x, 0)^2                 2 max(x, 0)
    tanh         tanh x                      1 - tanh(x)^2
    sigmoid      s(x)                        s(x) s(-x)

For a finite x neither is NaN, and a NaN stays one.

Saved for backward: gate and up, or the packed tensor, as they came; nothing is derived from them.
y is rebuilt from them for a consumer's backward (_recipe.py).

Precision: fp32 throughout, one rounding to the dtype of y, promote_types(gate, up); each gradient
is rounded once to its input's dtype. Stock rounds act(g) to the dtype of gate before it multiplies.

Semantics: transformers.models.llama.modeling_llama.LlamaMLP.forward (5.24) without its products;
Shazeer, GLU Variants Improve Transformer, 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fasttune import _native, _registry, _torch
from fasttune._native import glu_cuda
from fasttune.ops import _recipe, _support, _triton
from fasttune.ops._activations import ACTIVATIONS, check_activation
from fasttune.ops._arguments import accumulator, check_float, check_shape, output_shaped, rows_first


def _halves(gate: Tensor, up: Tensor | None, gate_first: bool) -> tuple[Tensor, Tensor]:
    """Gate and up [*, I]; views into ``gate`` where it is packed."""
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def _forward_fake(gate: Tensor, up: Tensor | None, activation: str, gate_first: bool) -> Tensor:
    gate, up = _halves(gate, up, gate_first)
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


def _backward_fake(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    gate_first: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    inputs = [gate, gate if up is None else up]
    return [x.new_empty(x.shape) for x, flag in zip(inputs, needs, strict=True) if flag]


FORWARD = _registry.define(
    "glu_fwd",
    "(Tensor gate, Tensor? up, str activation, bool gate_first) -> Tensor",
    _forward_fake,
)
BACKWARD = _registry.define(
    "glu_bwd",
    "(Tensor dy, Tensor gate, Tensor? up, str activation, bool gate_first, bool[] needs)"
    " -> Tensor[]",
    _backward_fake,
)


def _formula(gate: Tensor, up: Tensor | None, activation: str, gate_first: bool) -> Tensor:
    gate, up = _halves(gate, up, gate_first)
    dtype = torch.promote_types(gate.dtype, up.dtype)
    wide = accumulator(dtype)
    return (ACTIVATIONS[activation].value(gate.to(wide)) * up.to(wide)).to(dtype)


def _backward_reference(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    gate_first: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    packed = up is None
    gate, up = _halves(gate, up, gate_first)
    wide, act = accumulator(dy.dtype), ACTIVATIONS[activation]
    dy, g, u = dy.to(wide), gate.to(wide), up.to(wide)
    dgate, dup = (dy * u * act.slope(g)).to(gate.dtype), (dy * act.value(g)).to(up.dtype)
    if packed:
        return [torch.cat([dgate, dup] if gate_first else [dup, dgate], dim=-1)]
    return [grad for grad, flag in zip((dgate, dup), needs, strict=True) if flag]


def _forward_with(
    prims: ModuleType, gate: Tensor, up: Tensor | None, activation: str, gate_first: bool
) -> Tensor:
    gate, up = _halves(gate, up, gate_first)
    y: Tensor = prims.glu_forward(gate, up, activation=activation)
    return y


def _backward_with(
    prims: ModuleType,
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    gate_first: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients are allocated here, contiguous: one packed tensor if gate and up are."""
    dgate: Tensor | None
    dup: Tensor | None
    if up is None:
        packed = gate.new_empty(gate.shape)
        grads, (dgate, dup) = [packed], _halves(packed, None, gate_first)
    else:
        dgate = gate.new_empty(gate.shape) if needs[0] else None
        dup = up.new_empty(up.shape) if needs[1] else None
        grads = [grad for grad in (dgate, dup) if grad is not None]
    gate, up = _halves(gate, up, gate_first)
    prims.glu_backward(dy, gate, up, activation=activation, dgate=dgate, dup=dup)
    return grads


def _cpu_supports(*args: Any) -> str | None:
    return _support.why_not_cpu(args, ())


def _triton_supports(*args: Any) -> str | None:
    return _support.why_not_triton(args, ())


def _cuda_supports(*args: Any) -> str | None:
    """Why the CUDA C++ kernels cannot take the arguments of either op, or None."""
    reason = _support.why_not_cuda(args)
    if reason is not None:
        return reason
    dtypes = {arg.dtype for arg in args if isinstance(arg, Tensor)}
    return None if len(dtypes) == 1 else "it takes gate and up of one dtype"


@FORWARD.backend("cpu", _cpu_supports)
def _fwd_cpu(*args: Any) -> Tensor:
    return _forward_with(_native, *args)


@BACKWARD.backend("cpu", _cpu_supports)
def _bwd_cpu(*args: Any) -> list[Tensor]:
    return _backward_with(_native, *args)


@FORWARD.backend("triton", _triton_supports)
@_support.Repeated
def _fwd_triton(*args: Any) -> Tensor:
    return _forward_with(_triton.kernels("glu"), *args)


@BACKWARD.backend("triton", _triton_supports)
@_support.Repeated
def _bwd_triton(*args: Any) -> list[Tensor]:
    return _backward_with(_triton.kernels("glu"), *args)


@FORWARD.backend("cuda", _cuda_supports)
def _fwd_cuda(*args: Any) -> Tensor:
    return _forward_with(glu_cuda, *args)


@BACKWARD.backend("cuda", _cuda_supports)
def _bwd_cuda(*args: Any) -> list[Tensor]:
    return _backward_with(glu_cuda, *args)


FORWARD.backend("reference", _support.never)(_formula)
BACKWARD.backend("reference", _support.never)(_backward_reference)


class _Glu(_recipe.Producer, torch.autograd.Function):
    """gate [*, I] and up [*, I], or packed [*, 2I] and None, to y [*, I]."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor | None, activation: str, gate_first: bool
    ) -> Tensor:
        args = (*_as_rows(gate, up), activation, gate_first)
        if _registry.must_dispatch((gate, up)):
            ctx.backend = None
            y = FORWARD.registered(*args)
        else:
            ctx.backend = FORWARD.select(*args)
            y = ctx.backend.run(*args)
        ctx.save_for_backward(gate, up)
        ctx.set_materialize_grads(False)
        ctx.saved_bytes = gate.nbytes if up is None else gate.nbytes + up.nbytes
        ctx.rebuildable = ctx.backend is not None or _recipe.possible((gate, up))
        ctx.options, ctx.needs = (activation, gate_first), list(ctx.needs_input_grad[:2])
        return output_shaped(y, (*gate.shape[:-1], y.shape[-1]))

    @staticmethod
    def rebuild(node: Any, saved: tuple[Any, ...]) -> Tensor:
        gate, up = saved
        y = _recipe.forward_again(node, FORWARD, *_as_rows(gate, up), *node.options)
        return output_shaped(y, (*gate.shape[:-1], y.shape[-1]))

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        gate, up = _recipe.saved(ctx, last=True)
        if dy is None:
            return None, None, None, None
        rows, up_rows = _as_rows(gate, up)
        dy_rows = rows_first(dy, rows.shape[0], dy.shape[-1])
        run = (
            BACKWARD.registered if ctx.backend is None else BACKWARD.backends[ctx.backend.name].run
        )
        grads = iter(run(dy_rows, rows, up_rows, *ctx.options, ctx.needs))
        dgate, dup = (next(grads).view(gate.shape) if flag else None for flag in ctx.needs)
        return dgate, dup, None, None


def _as_rows(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[*, I] as [M, I]."""
    rows, width = math.prod(gate.shape[:-1]), gate.shape[-1]
    return rows_first(gate, rows, width), None if up is None else rows_first(up, rows, width)


def glu(
    gate: Tensor,  # [*, I], or packed [*, 2I]
    up: Tensor | None = None,  # [*, I]
    *,
    activation: str,
    gate_first: bool = True,
) -> Tensor:
    """act(gate) * up, [*, I].

    Args:
        gate: fp32, bf16, fp16 (fp64 on the reference backend), any leading shape, also empty.
            Without ``up`` it holds both, one after the other along the last dimension.
        up: the shape and device of gate; may have another float dtype.
        activation: silu, gelu, gelu_tanh, quick_gelu, relu, relu2, tanh, sigmoid or leaky_relu.
        gate_first: which half of a packed tensor is the gate; unused if ``up`` is given.

    Returns:
        [*, I] in ``torch.promote_types(gate.dtype, up.dtype)``, also under autocast. The gradient
        of a packed tensor is one tensor.

    Raises:
        TypeError: an argument is no tensor or has no float dtype, or activation is no string.
        ValueError: shapes or devices do not fit, a packed tensor has an odd number of columns, or
            there is no such activation.

    Semantics: ``LlamaMLP.forward`` of transformers (5.24), packed ``Phi3MLP.forward``.
    """
    check_activation(activation)
    check_float("gate", gate)
    if gate.dim() < 1:
        raise ValueError(
            f"gate: expected at least one dimension [*, I], got shape {tuple(gate.shape)}"
        )
    if up is not None:
        check_shape("up", up, tuple(gate.shape), gate.device, like="gate")
    elif gate.shape[-1] % 2:
        raise ValueError(
            f"gate: expected an even number of columns without up, got {gate.shape[-1]}"
        )
    return apply_glu(gate, up, activation, gate_first)


def apply_glu(gate: Tensor, up: Tensor | None, activation: str, gate_first: bool = True) -> Tensor:
    """:func:`glu` without validation, for callers that know their arguments."""
    if _torch.in_functorch():  # plain torch operations compose with vmap and grad
        return _formula(gate, up, activation, gate_first)
    y: Tensor = _Glu.apply(gate, up, activation, gate_first)  # type: ignore[no-untyped-call]
    return y

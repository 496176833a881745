"""scaled_glu: the gated activation of an MLP whose hidden state (IA)^3 scales.

Maths, elementwise over [M, I] with scale w [I]; activations and slopes are those of glu.py:

    y = act(g) u w
    dg = dy w u act'(g),   du = dy w act(g),   dw = sum_m dy act(g) u

One pass forward and one backward, where `glu` and `ia3_scale` one after the other also write and
read act(g) u, its rebuilt copy and its gradient.

Saved for backward: gate and up, or the packed tensor, as they came, and the scale. y is rebuilt
from them for a consumer's backward (_recipe.py).

Precision: fp32 throughout, one rounding to the dtype of y, promote_types(gate, up); dgate and dup
are rounded once to their input's dtype. dw accumulates in fp32 in an order that the shape fixes and
is rounded once to the scale's dtype.

Semantics: transformers.models.llama.modeling_llama.LlamaMLP.forward (5.24) without its products,
then peft.tuners.ia3.layer.Linear.forward (0.21) of a feed-forward module before its base layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttune import _native, _registry, _torch
from fasttune.ops import _recipe, _support, _triton
from fasttune.ops._activations import ACTIVATIONS, check_activation
from fasttune.ops._arguments import accumulator, check_float, check_shape, output_shaped, rows_first


def _halves(gate: Tensor, up: Tensor | None, gate_first: bool) -> tuple[Tensor, Tensor]:
    """Gate and up [*, I]; views into ``gate`` where it is packed."""
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def _forward_fake(
    gate: Tensor, up: Tensor | None, scale: Tensor, activation: str, gate_first: bool
) -> Tensor:
    gate, up = _halves(gate, up, gate_first)
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


def _backward_fake(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    scale: Tensor,
    activation: str,
    gate_first: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    inputs = [gate, gate if up is None else up]
    grads = [x.new_empty(x.shape) for x, flag in zip(inputs, needs[:2], strict=True) if flag]
    if needs[2]:
        grads.append(dy.new_empty(dy.shape[1], dtype=accumulator(dy.dtype)))
    return grads


FORWARD = _registry.define(
    "scaled_glu_fwd",
    "(Tensor gate, Tensor? up, Tensor scale, str activation, bool gate_first) -> Tensor",
    _forward_fake,
)
BACKWARD = _registry.define(
    "scaled_glu_bwd",
    "(Tensor dy, Tensor gate, Tensor? up, Tensor scale, str activation, bool gate_first, "
    "bool[] needs) -> Tensor[]",
    _backward_fake,
)


def _formula(
    gate: Tensor, up: Tensor | None, scale: Tensor, activation: str, gate_first: bool
) -> Tensor:
    gate, up = _halves(gate, up, gate_first)
    dtype = torch.promote_types(gate.dtype, up.dtype)
    wide = accumulator(dtype)
    y = ACTIVATIONS[activation].value(gate.to(wide)) * up.to(wide) * scale.to(wide)
    return y.to(dtype)


def _backward_reference(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    scale: Tensor,
    activation: str,
    gate_first: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    packed = up is None
    gate, up = _halves(gate, up, gate_first)
    wide, act = accumulator(dy.dtype), ACTIVATIONS[activation]
    dy, g, u, w = dy.to(wide), gate.to(wide), up.to(wide), scale.to(wide)
    dgate, dup = (dy * w * u * act.slope(g)).to(gate.dtype), (dy * w * act.value(g)).to(up.dtype)
    if packed:
        grads = [torch.cat([dgate, dup] if gate_first else [dup, dgate], dim=-1)]
        grads = grads if needs[0] else []
    else:
        grads = [grad for grad, flag in zip((dgate, dup), needs[:2], strict=True) if flag]
    if needs[2]:
        grads.append((dy * act.value(g) * u).sum(0))
    return grads


def _forward_with(
    prims: Any,
    gate: Tensor,
    up: Tensor | None,
    scale: Tensor,
    activation: str,
    gate_first: bool,
) -> Tensor:
    gate, up = _halves(gate, up, gate_first)
    y: Tensor = prims.scaled_glu_forward(gate, up, scale, activation=activation)
    return y


def _backward_with(
    prims: Any,
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    scale: Tensor,
    activation: str,
    gate_first: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients are allocated here, contiguous: one packed tensor if gate and up are."""
    dgate: Tensor | None = None
    dup: Tensor | None = None
    grads: list[Tensor] = []
    if up is None and needs[0]:
        grads = [gate.new_empty(gate.shape)]
        dgate, dup = _halves(grads[0], None, gate_first)
    elif up is not None:
        dgate = gate.new_empty(gate.shape) if needs[0] else None
        dup = up.new_empty(up.shape) if needs[1] else None
        grads = [grad for grad in (dgate, dup) if grad is not None]
    gate, up = _halves(gate, up, gate_first)
    dscale = prims.scaled_glu_backward(
        dy, gate, up, scale, activation=activation, dgate=dgate, dup=dup, need_dscale=needs[2]
    )
    return grads if dscale is None else [*grads, dscale]


class _TritonPrimitives:
    """The launchers, loaded at the first call."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_triton.kernels("scaled_glu"), name)


def _cpu_supports(*args: Any) -> str | None:
    return _support.why_not_cpu(args, ())


def _triton_supports(*args: Any) -> str | None:
    return _support.why_not_triton(args, ())


for _op, _run, _plain in (
    (FORWARD, _forward_with, _formula),
    (BACKWARD, _backward_with, _backward_reference),
):
    _op.backend("cpu", _cpu_supports)(partial(_run, _native))
    _op.backend("triton", _triton_supports)(_support.Repeated(partial(_run, _TritonPrimitives())))
    _op.backend("reference", _support.never)(_plain)


class _ScaledGlu(_recipe.Producer, torch.autograd.Function):
    """gate [*, I] and up [*, I], or packed [*, 2I] and None, and scale [I], to y [*, I]."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor | None,
        scale: Tensor,
        activation: str,
        gate_first: bool,
    ) -> Tensor:
        args = (*_as_rows(gate, up), scale, activation, gate_first)
        dispatched = _registry.must_dispatch((gate, up, scale))
        ctx.backend = None if dispatched else FORWARD.select(*args)
        y = FORWARD.registered(*args) if ctx.backend is None else ctx.backend.run(*args)
        ctx.save_for_backward(gate, up, scale)
        ctx.set_materialize_grads(False)
        ctx.saved_bytes = gate.nbytes if up is None else gate.nbytes + up.nbytes
        ctx.rebuildable = ctx.backend is not None or _recipe.possible((gate, up, scale))
        ctx.options, ctx.needs = (activation, gate_first), list(ctx.needs_input_grad[:3])
        return output_shaped(y, (*gate.shape[:-1], y.shape[-1]))

    @staticmethod
    def rebuild(node: Any, saved: tuple[Any, ...]) -> Tensor:
        gate, up, scale = saved
        y = _recipe.forward_again(node, FORWARD, *_as_rows(gate, up), scale, *node.options)
        return output_shaped(y, (*gate.shape[:-1], y.shape[-1]))

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        gate, up, scale = _recipe.saved(ctx, last=True)
        if dy is None:
            return None, None, None, None, None
        rows, up_rows = _as_rows(gate, up)
        dy_rows = rows_first(dy, rows.shape[0], dy.shape[-1])
        run = (
            BACKWARD.registered if ctx.backend is None else BACKWARD.backends[ctx.backend.name].run
        )
        grads = iter(run(dy_rows, rows, up_rows, scale, *ctx.options, ctx.needs))
        dgate, dup = (next(grads).view(gate.shape) if flag else None for flag in ctx.needs[:2])
        dscale = next(grads).to(scale.dtype) if ctx.needs[2] else None
        return dgate, dup, dscale, None, None


def _as_rows(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[*, I] as [M, I]."""
    rows, width = math.prod(gate.shape[:-1]), gate.shape[-1]
    return rows_first(gate, rows, width), None if up is None else rows_first(up, rows, width)


def scaled_glu(
    gate: Tensor,  # [*, I], or packed [*, 2I]
    up: Tensor | None,  # [*, I]
    scale: Tensor,  # [I]
    *,
    activation: str,
    gate_first: bool = True,
) -> Tensor:
    """act(gate) * up * scale, [*, I].

    Args:
        gate, up, activation, gate_first: as :func:`glu` takes them.
        scale: [I] on the device of gate, of any float dtype.

    Returns:
        [*, I] in ``torch.promote_types(gate.dtype, up.dtype)``, also under autocast.

    Raises:
        TypeError: an argument is no tensor or has no float dtype, or activation is no string.
        ValueError: shapes or devices do not fit, a packed tensor has an odd number of columns, or
            there is no such activation.

    Source: (IA)^3, Liu et al. (2022), on the hidden state of a gated MLP.
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
    width = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    check_shape("scale", scale, (width,), gate.device, like="gate")
    return apply_scaled_glu(gate, up, scale, activation, gate_first)


def apply_scaled_glu(
    gate: Tensor, up: Tensor | None, scale: Tensor, activation: str, gate_first: bool = True
) -> Tensor:
    """:func:`scaled_glu` without validation, for callers that know their arguments."""
    if _torch.in_functorch():  # plain torch operations compose with vmap and grad
        return _formula(gate, up, scale, activation, gate_first)
    y: Tensor = _ScaledGlu.apply(gate, up, scale, activation, gate_first)  # type: ignore[no-untyped-call]
    return y

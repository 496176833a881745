"""ia3_scale: (IA)^3's learned vector on activations, y = x scale.

Maths, for x [M, N] and scale [N]:

    y = x scale
    dx = dy scale,   dscale = sum_m dy x

Saved for backward: x as it came, only if the scale trains, and not if its producer can rebuild it
(_recipe.py). y is a producer's output in turn: whoever needs it in backward multiplies again, so
that x and y are never both kept. A frozen scale keeps nothing and sums nothing.

Precision: fp32 products. y is rounded once to x's dtype, dx once to it as well; dscale accumulates
in fp32 in an order that the shape fixes and is rounded once to the scale's dtype. Autocast changes
nothing.

Semantics: (IA)^3 (Liu et al., 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper
than In-Context Learning"), peft.tuners.ia3.layer.Linear.forward (0.21) around its base layer.
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
from fasttune.ops._arguments import accumulator, check_float, check_shape, output_shaped, rows_first

_INPUT = 0  # of x among the tensors of the Function


def _forward_fake(x: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    dy: Tensor, x: Tensor | None, scale: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    grads = [dy.new_empty(dy.shape)] if needs[0] else []
    if needs[1]:
        grads.append(dy.new_empty(dy.shape[1], dtype=accumulator(dy.dtype)))
    return grads


FORWARD = _registry.define("ia3_scale_fwd", "(Tensor x, Tensor scale) -> Tensor", _forward_fake)
BACKWARD = _registry.define(
    "ia3_scale_bwd",
    "(Tensor dy, Tensor? x, Tensor scale, bool[] needs) -> Tensor[]",
    _backward_fake,
)


def _formula(x: Tensor, scale: Tensor) -> Tensor:
    wide = accumulator(x.dtype)
    return (x.to(wide) * scale.to(wide)).to(x.dtype)


def _backward_reference(
    dy: Tensor, x: Tensor | None, scale: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    grads = [_formula(dy, scale)] if needs[0] else []
    if needs[1] and x is not None:
        wide = accumulator(dy.dtype)
        grads.append((dy.to(wide) * x.to(wide)).sum(0))
    return grads


class _TritonPrimitives:
    """The launchers, loaded at the first call."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_triton.kernels("scaled_sum" if name == "scaled_sum" else "ia3_scale"), name)


def _forward_with(prims: Any, x: Tensor, scale: Tensor) -> Tensor:
    y: Tensor = prims.scaled_sum(
        x, None, scale.contiguous(), 1.0, seed=None, threshold=0, out_dtype=x.dtype
    )
    return y


def _backward_with(
    prims: Any, dy: Tensor, x: Tensor | None, scale: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    if not needs[1] or x is None:
        return [_forward_with(prims, dy, scale)] if needs[0] else []
    dx, dscale = prims.ia3_scale_backward(dy, x, scale, need_dx=needs[0])
    return [dscale] if dx is None else [dx, dscale]


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


class _Ia3Scale(_recipe.Producer, torch.autograd.Function):
    """x and scale to y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        args = (_as_rows(x), scale)
        dispatched = _registry.must_dispatch((x, scale))
        ctx.backend = None if dispatched else FORWARD.select(*args)
        y = FORWARD.registered(*args) if ctx.backend is None else ctx.backend.run(*args)
        ctx.needs = list(ctx.needs_input_grad)
        trains = ctx.needs[1]
        ctx.recipe = trains and not torch.compiler.is_compiling() and _recipe.available(x)
        kept = x if trains and not ctx.recipe else None
        ctx.save_for_backward(kept, scale)
        ctx.set_materialize_grads(False)
        ctx.saved_bytes = 0 if kept is None else kept.nbytes
        # With a frozen scale nothing of x is kept, not even for a consumer.
        ctx.rebuildable = trains and (ctx.backend is not None or _recipe.possible((x, scale)))
        return output_shaped(y, x.shape)

    @staticmethod
    def rebuild(node: Any, saved: tuple[Any, ...]) -> Tensor:
        kept, scale = saved
        x = _recipe.rebuild(node, _INPUT) if node.recipe else kept
        y = _recipe.forward_again(node, FORWARD, _as_rows(x), scale)
        return output_shaped(y, x.shape)

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        x, scale = _recipe.saved(ctx, last=True)
        if dy is None:
            return None, None
        if ctx.recipe:
            x = _recipe.rebuild(ctx, _INPUT)
        run = BACKWARD.registered
        if ctx.backend is not None:
            run = BACKWARD.backends[ctx.backend.name].run
        grads = iter(run(_as_rows(dy), None if x is None else _as_rows(x), scale, ctx.needs))
        dx = next(grads).view(dy.shape) if ctx.needs[0] else None
        dscale = next(grads).to(scale.dtype) if ctx.needs[1] else None
        return dx, dscale


def _as_rows(x: Tensor) -> Tensor:
    """[*, N] as [M, N]."""
    return rows_first(x, math.prod(x.shape[:-1]), x.shape[-1])


def ia3_scale(
    x: Tensor,  # [*, N]
    scale: Tensor,  # [N]
) -> Tensor:
    """x scale over the last dimension, [*, N].

    Args:
        x: [*, N], fp32, bf16, fp16 (fp64 on the reference backend), any leading shape, also empty.
        scale: [N] on the device of x, of any float dtype.

    Returns:
        [*, N] in the dtype of x, also under autocast.

    Raises:
        TypeError: an argument is no tensor or has no float dtype.
        ValueError: shapes or devices do not fit.

    Source: (IA)^3, Liu et al. (2022), Few-Shot Parameter-Efficient Fine-Tuning is Better and
    Cheaper than In-Context Learning.
    """
    check_float("x", x)
    if x.dim() < 1:
        raise ValueError(f"x: expected at least one dimension [*, N], got shape {list(x.shape)}")
    check_shape("scale", scale, (x.shape[-1],), x.device)
    return apply_ia3_scale(x, scale)


def apply_ia3_scale(x: Tensor, scale: Tensor) -> Tensor:
    """:func:`ia3_scale` without validation, for callers that know their arguments."""
    if _torch.in_functorch():  # plain torch operations compose with vmap and grad
        return _formula(x, scale)
    y: Tensor = _Ia3Scale.apply(x, scale)  # type: ignore[no-untyped-call]
    return y

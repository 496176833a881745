"""layer_norm: rows shifted and scaled to mean 0 and variance 1, times a weight, plus a bias.

Maths, for a row x of H features, all in fp32:

    mean = mean(x)                                           [M], saved
    rstd = 1 / sqrt(mean((x - mean)^2) + eps)                [M], saved
    n = (x - mean) rstd,  w' = weight_offset + weight (1 without a weight)
    y = n w' + bias

    g = dy w'
    dx = rstd (g - mean(g) - n mean(g n))
    dweight = sum_m dy n,  dbias = sum_m dy

add_layer_norm normalises s = x + residual and returns s too; x and residual both get dx at s plus
the gradient that arrives at s.

Saved for backward: x as it came (or s), mean, rstd, and weight and bias, parameters.

Rounding: y is rounded once, to x's dtype; dx once, to x's dtype, after the gradient at s is added;
dweight and dbias accumulate in fp32 and are rounded once to their parameter's dtype. s is rounded
to x's dtype, and the rounded s is normalised. Autocast changes nothing (torch's layer_norm on CUDA
under autocast returns fp32).

layer_norm's node is a producer (_recipe.py): its output is rebuilt by running the forward again.

Semantics: torch.nn.functional.layer_norm over the last dimension, on upcast operands;
``weight_offset=1`` is Nemotron's. Layer normalization (Ba et al., 2016).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune import _registry, _torch
from fasttune.ops import _layer_norm_reference, _recipe
from fasttune.ops._arguments import output_shaped
from fasttune.ops._layer_norm_backends import ADD_FORWARD, BACKWARD, FORWARD
from fasttune.ops._norms import as_rows, validate

_Facts = tuple[float, float]  # eps and weight_offset


class _LayerNorm(_recipe.Producer, torch.autograd.Function):
    """x, weight and bias to y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, facts: _Facts
    ) -> Tensor:
        args = (as_rows(x), weight, bias, *facts, x.dtype)
        tensors = (x, weight, bias)
        ctx.backend = None if _registry.must_dispatch(tensors) else FORWARD.select(*args)
        ctx.rebuildable = ctx.backend is not None or _recipe.possible(tensors)
        run = FORWARD.registered if ctx.backend is None else ctx.backend.run
        y, mean, rstd = run(*args)
        # The bias is for rebuilding y only.
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.saved_bytes = x.numel() * x.element_size() + 2 * rstd.numel() * rstd.element_size()
        ctx.facts, ctx.needs = facts, ctx.needs_input_grad[:3]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output_shaped(y, x.shape)

    @staticmethod
    def rebuild(node: Any, saved: tuple[Tensor, ...]) -> Tensor:
        x, weight, bias, _, _ = saved
        args = (as_rows(x), weight, bias, *node.facts, x.dtype)
        y, _, _ = _recipe.forward_again(node, FORWARD, *args)
        return output_shaped(y, x.shape)

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return None, None, None, None
        x, weight, _, mean, rstd = _recipe.saved(ctx, last=True)
        return *_gradients(ctx, dy, x, weight, mean, rstd, None, *ctx.needs), None


class _AddLayerNorm(torch.autograd.Function):
    """x, residual, weight and bias to y and s."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        facts: _Facts,
    ) -> tuple[Tensor, Tensor]:
        args = (as_rows(x), as_rows(residual), weight, bias, *facts, x.dtype)
        dispatched = _registry.must_dispatch((x, residual, weight, bias))
        ctx.backend = None if dispatched else ADD_FORWARD.select(*args)
        run = ADD_FORWARD.registered if ctx.backend is None else ctx.backend.run
        y, s, mean, rstd = run(*args)
        s = output_shaped(s, x.shape)
        ctx.save_for_backward(s, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.saved_bytes = s.numel() * s.element_size() + 2 * rstd.numel() * rstd.element_size()
        ctx.facts, ctx.needs = facts, ctx.needs_input_grad[:4]
        ctx.residual_dtype = residual.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output_shaped(y, x.shape), s

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> Any:
        need_x, need_residual, *need_vectors = ctx.needs
        dx, dweight, dbias = ds, None, None
        if dy is not None:
            s, weight, mean, rstd = ctx.saved_tensors
            needs = (need_x or need_residual, *need_vectors)
            dx, dweight, dbias = _gradients(ctx, dy, s, weight, mean, rstd, ds, *needs)
        if dx is None:
            return None, None, dweight, dbias, None
        dresidual = dx.to(ctx.residual_dtype) if need_residual else None
        return (dx if need_x else None), dresidual, dweight, dbias, None


def _gradients(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    addend: Tensor | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx in the shape of x, and dweight and dbias in their parameter's dtype, where needed."""
    if not (need_dx or need_dweight or need_dbias):
        return None, None, None
    run = BACKWARD.registered if ctx.backend is None else BACKWARD.backends[ctx.backend.name].run
    added = as_rows(addend) if addend is not None and need_dx else None
    grads = run(
        as_rows(dy), as_rows(x), weight, mean, rstd, added, ctx.facts[1], need_dx, need_dweight,
        need_dbias,
    )  # fmt: skip
    dx = output_shaped(grads[0], x.shape) if need_dx else None
    dbias = grads[-1].to(ctx.bias_dtype) if need_dbias else None
    dweight = None
    if need_dweight and weight is not None:
        dweight = grads[int(need_dx)].to(weight.dtype)
    return dx, dweight, dbias


def layer_norm(
    x: Tensor,  # [*, H]
    weight: Tensor | None = None,  # [H]
    bias: Tensor | None = None,  # [H]
    *,
    eps: float,
    weight_offset: float = 0.0,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * (weight_offset + weight) + bias over the last dimension.

    Args:
        x: [*, H], fp32, bf16, fp16 (fp64 on the reference backend), any leading shape, also empty.
        weight: [H] of any float dtype; None for ones.
        bias: [H] of any float dtype; None for zeros.
        eps: added to the (biased) variance.
        weight_offset: added to the weight; 1 for Nemotron.

    Returns:
        [*, H] in x's dtype, also under autocast.

    Raises:
        TypeError: an argument is no tensor or has no float dtype, or eps is no number.
        ValueError: shapes or devices do not fit.

    Semantics: ``torch.nn.functional.layer_norm`` on upcast operands, rounded once.
    """
    validate(x, eps, x, weight=weight, bias=bias)
    return apply_layer_norm(x, weight, bias, eps, weight_offset)


def add_layer_norm(
    x: Tensor,  # [*, H]
    residual: Tensor,  # [*, H]
    weight: Tensor | None = None,  # [H]
    bias: Tensor | None = None,  # [H]
    *,
    eps: float,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(y, s): s = x + residual [*, H] in x's dtype, and y = :func:`layer_norm` of it, in one pass.

    ``residual`` has the shape of x and any float dtype; everything else as :func:`layer_norm`.
    """
    validate(x, eps, residual, weight=weight, bias=bias)
    return apply_add_layer_norm(x, residual, weight, bias, eps, weight_offset)


def apply_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float
) -> Tensor:
    """:func:`layer_norm` without validation, for callers that know their arguments."""
    if _torch.in_functorch():  # plain torch operations compose with vmap and grad
        return _layer_norm_reference.forward(x, weight, bias, eps, weight_offset, x.dtype)[0]
    y: Tensor = _LayerNorm.apply(x, weight, bias, (eps, weight_offset))  # type: ignore[no-untyped-call]
    return y


def apply_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """:func:`add_layer_norm` without validation, for callers that know their arguments."""
    facts = (eps, weight_offset)
    if _torch.in_functorch():
        plain = _layer_norm_reference.add_forward(x, residual, weight, bias, *facts, x.dtype)
        return plain[:2]
    apply: Any = _AddLayerNorm.apply
    outputs: tuple[Tensor, Tensor] = apply(x, residual, weight, bias, facts)
    return outputs

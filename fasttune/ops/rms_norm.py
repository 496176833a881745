"""rms_norm: rows scaled to a root mean square of one, times a weight; alone or after an addition.

Maths, for a row x of H features, all in fp32:

    rstd = 1 / sqrt(mean(x^2) + eps)                         [M], saved
    n = x rstd,  w' = weight_offset + weight (1 without a weight)
    y = n w'

    g = dy w'
    dx = rstd (g - n mean(g n))
    dweight = sum_m dy n

add_rms_norm normalises s = x + residual and returns s too; x and residual both get dx at s plus the
gradient that arrives at s.

Saved for backward: x as it came (or s), rstd, and the weight, a parameter.

Rounding: y is rounded once, to x's dtype. With ``round_first``, Llama's order, n is rounded to x's
dtype before the weight multiplies and y has the dtype that torch promotes x's and the weight's to.
dx is rounded once, to x's dtype, after the gradient at s is added; dweight accumulates in fp32 and
is rounded once to the weight's dtype. s is rounded to x's dtype, and the rounded s is normalised.
Autocast changes nothing.

rms_norm's node is a producer (_recipe.py): its output is rebuilt by running the forward again.

Semantics: transformers 5 LlamaRMSNorm (``round_first``), GemmaRMSNorm (``weight_offset=1``),
Olmo2RMSNorm, GptOssRMSNorm; RMSNorm (Zhang and Sennrich, 2019).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune import _registry, _torch
from fasttune.ops import _recipe, _rms_norm_reference
from fasttune.ops._arguments import output_shaped
from fasttune.ops._norms import as_rows, validate
from fasttune.ops._rms_norm_backends import ADD_FORWARD, BACKWARD, FORWARD

# eps, weight_offset, round_first and the dtype of y
_Facts = tuple[float, float, bool, torch.dtype]


class _RmsNorm(_recipe.Producer, torch.autograd.Function):
    """x and weight to y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, facts: _Facts) -> Tensor:
        args = (as_rows(x), weight, *facts)
        tensors = (x, weight)
        ctx.backend = None if _registry.must_dispatch(tensors) else FORWARD.select(*args)
        ctx.rebuildable = ctx.backend is not None or _recipe.possible(tensors)
        y, rstd = FORWARD.registered(*args) if ctx.backend is None else ctx.backend.run(*args)
        ctx.save_for_backward(x, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.saved_bytes = x.numel() * x.element_size() + rstd.numel() * rstd.element_size()
        ctx.facts, ctx.needs = facts, ctx.needs_input_grad[:2]
        return output_shaped(y, x.shape)

    @staticmethod
    def rebuild(node: Any, saved: tuple[Tensor, ...]) -> Tensor:
        x, weight, _ = saved
        y, _ = _recipe.forward_again(node, FORWARD, as_rows(x), weight, *node.facts)
        return output_shaped(y, x.shape)

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return None, None, None
        x, weight, rstd = _recipe.saved(ctx, last=True)
        return *_gradients(ctx, dy, x, weight, rstd, None, *ctx.needs), None


class _AddRmsNorm(torch.autograd.Function):
    """x, residual and weight to y and s."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, facts: _Facts
    ) -> tuple[Tensor, Tensor]:
        args = (as_rows(x), as_rows(residual), weight, *facts)
        dispatched = _registry.must_dispatch((x, residual, weight))
        ctx.backend = None if dispatched else ADD_FORWARD.select(*args)
        run = ADD_FORWARD.registered if ctx.backend is None else ctx.backend.run
        y, s, rstd = run(*args)
        s = output_shaped(s, x.shape)
        ctx.save_for_backward(s, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.saved_bytes = s.numel() * s.element_size() + rstd.numel() * rstd.element_size()
        ctx.facts, ctx.needs = facts, ctx.needs_input_grad[:3]
        ctx.residual_dtype = residual.dtype
        return output_shaped(y, x.shape), s

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> Any:
        need_x, need_residual, need_weight = ctx.needs
        dx, dweight = ds, None
        if dy is not None:
            s, weight, rstd = ctx.saved_tensors
            need_s = need_x or need_residual
            dx, dweight = _gradients(ctx, dy, s, weight, rstd, ds, need_s, need_weight)
        if dx is None:
            return None, None, dweight, None
        dresidual = dx.to(ctx.residual_dtype) if need_residual else None
        return (dx if need_x else None), dresidual, dweight, None


def _gradients(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    addend: Tensor | None,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx in the shape of x, and dweight in the weight's dtype, where needed."""
    if not (need_dx or need_dweight):
        return None, None
    run = BACKWARD.registered if ctx.backend is None else BACKWARD.backends[ctx.backend.name].run
    added = as_rows(addend) if addend is not None and need_dx else None
    grads = run(as_rows(dy), as_rows(x), weight, rstd, added, ctx.facts[1], need_dx, need_dweight)
    dx = output_shaped(grads[0], x.shape) if need_dx else None
    dweight = grads[-1].to(weight.dtype) if need_dweight and weight is not None else None
    return dx, dweight


def rms_norm(
    x: Tensor,  # [*, H]
    weight: Tensor | None = None,  # [H]
    *,
    eps: float,
    weight_offset: float = 0.0,
    round_first: bool = False,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight_offset + weight) over the last dimension, [*, H].

    Args:
        x: [*, H], fp32, bf16, fp16 (fp64 on the reference backend), any leading shape, also empty.
        weight: [H] of any float dtype; None leaves the normalised x.
        eps: added to the mean square.
        weight_offset: added to the weight; 1 for Gemma.
        round_first: round the normalised x to x's dtype before the weight multiplies, as Llama.

    Returns:
        [*, H] in x's dtype or, with ``round_first``, in the dtype that x's and the weight's promote
        to.

    Raises:
        TypeError: an argument is no tensor or has no float dtype, or eps is no number.
        ValueError: shapes or devices do not fit.

    Semantics: ``transformers`` 5, ``LlamaRMSNorm`` with ``round_first``, ``GemmaRMSNorm`` with
    ``weight_offset=1``, ``Olmo2RMSNorm`` without both.
    """
    validate(x, eps, x, weight=weight)
    return apply_rms_norm(x, weight, eps, weight_offset, round_first)


def add_rms_norm(
    x: Tensor,  # [*, H]
    residual: Tensor,  # [*, H]
    weight: Tensor | None = None,  # [H]
    *,
    eps: float,
    weight_offset: float = 0.0,
    round_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm` of s = x + residual, and s [*, H] in x's dtype: (y, s), one pass over both.

    ``residual`` has the shape of x and any float dtype; everything else as :func:`rms_norm`.
    """
    validate(x, eps, residual, weight=weight)
    return apply_add_rms_norm(x, residual, weight, eps, weight_offset, round_first)


def apply_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, round_first: bool
) -> Tensor:
    """:func:`rms_norm` without validation, for callers that know their arguments."""
    facts = (eps, weight_offset, round_first, _out_dtype(x, weight, round_first))
    if _torch.in_functorch():  # plain torch operations compose with vmap and grad
        return _rms_norm_reference.forward(x, weight, *facts)[0]
    y: Tensor = _RmsNorm.apply(x, weight, facts)  # type: ignore[no-untyped-call]
    return y


def apply_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`add_rms_norm` without validation, for callers that know their arguments."""
    facts = (eps, weight_offset, round_first, _out_dtype(x, weight, round_first))
    if _torch.in_functorch():
        return _rms_norm_reference.add_forward(x, residual, weight, *facts)[:2]
    outputs: tuple[Tensor, Tensor] = _AddRmsNorm.apply(x, residual, weight, facts)  # type: ignore[no-untyped-call]
    return outputs


def _out_dtype(x: Tensor, weight: Tensor | None, round_first: bool) -> torch.dtype:
    if not round_first or weight is None:
        return x.dtype
    return torch.promote_types(x.dtype, weight.dtype)

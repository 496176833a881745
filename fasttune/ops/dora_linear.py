"""dora_linear: a linear layer with one DoRA adapter, through the factored norm.

Maths, with W [N, K], A [R, K], B [N, R], magnitude m [N], products accumulated in fp32:

    n = sqrt(||W||^2 + s <B, 2 W A^T + s B A A^T>)    [N] by rows; no gradient (PEFT)
    g = m / n
    y = g (x W^T + s x A^T B^T) + bias                                without dropout
    y = x W^T + (g - 1) u W^T + g s u A^T B^T + bias                  u = x keep / (1 - p)

    t = s u A^T,  d = s / (1 - p) dy (g B),  dB = g dy^T t,  dA = d^T (x keep)
    dm = sum_rows dy (u W^T + t B^T) / n

Neither the N x K product B A nor the K x K identity that PEFT multiplies by is formed. W is read
for n at every call, next to the product that reads it anyway: a cached ||W||^2 would be stale after
a write through ``.data``, which PEFT's merge does.

Saved for backward: x as it came (not if its producer can rebuild it), t, and the base product
[M, N] if the magnitude trains: it cannot be had back from y where g is 0.

Precision: A, B and m are never rounded. The base product is rounded to the compute dtype; with
dropout and fp32 adapters outside autocast it stays in fp32, as PEFT's does (docs/precision.md).

Semantics: peft.tuners.lora.dora.DoraLinearLayer.forward (PEFT 0.21); DoRA (Liu et al., 2024).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fasttune import _registry, _torch
from fasttune.ops import _dora_linear_reference, _dropout, _recipe
from fasttune.ops._arguments import (
    check_float,
    check_shape,
    output_shaped,
    rows_first,
)
from fasttune.ops._dora_linear_backends import BACKWARD, FORWARD

_X = 0  # position of x among the tensor inputs


def dora_weight_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The norm [N] of every row of ``weight + scaling b a``, without forming it.

    Args:
        weight: [N, K], fp32, bf16, fp16 or fp64, any strides.
        a, b: [R, K], [N, R].
        scaling: of the adapter.

    Returns:
        [N] in fp32 (fp64 for an fp64 weight), without a gradient.
    """
    with torch.autocast(weight.device.type, enabled=False):
        return _dora_linear_reference.weight_norm(weight, a, b, scaling)


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        norm: Tensor | None,
        seed: Tensor | None,
        scaling: float,
        threshold: int,
        dtype: torch.dtype,
        base_dtype: torch.dtype,
    ) -> Tensor:
        needs = list(ctx.needs_input_grad[:6])
        rows = rows_first(x, math.prod(x.shape[:-1]), x.shape[-1])
        facts = (norm, seed, scaling, threshold)
        args = (rows, weight, bias, a, b, magnitude, *facts, dtype, base_dtype, needs[5])
        if _registry.must_dispatch((x, weight, a, b, magnitude)):
            ctx.backend = None
            y, t, base, own_norm = FORWARD.registered(*args)
        else:
            ctx.backend = FORWARD.select(*args)
            y, t, base, own_norm = ctx.backend.run(*args)
        norm = own_norm if norm is None else norm
        need_input = needs[1] or needs[3]
        ctx.recipe = need_input and not torch.compiler.is_compiling() and _recipe.available(x)
        keep_input = need_input and not ctx.recipe
        keep_t = needs[4] or needs[5]
        ctx.save_for_backward(
            x if keep_input else None, weight, a, b, magnitude, norm, seed,
            t if keep_t else None, base if needs[5] else None,
        )  # fmt: skip
        kept = (x if keep_input else None, t if keep_t else None, base if needs[5] else None)
        ctx.saved_bytes = sum(k.numel() * k.element_size() for k in kept if k is not None)
        ctx.facts = (
            scaling,
            threshold,
            x.shape,
            x.dtype,
            needs,
            None if bias is None else bias.dtype,
        )
        return output_shaped(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, dy: Tensor) -> Any:
        scaling, threshold, shape, x_dtype, needs, bias_dtype = ctx.facts
        x, weight, a, b, magnitude, norm, seed, t, base = ctx.saved_tensors
        if ctx.recipe:
            x = _recipe.rebuild(ctx, _X)
        m = math.prod(shape[:-1])
        args = (
            rows_first(dy, m, dy.shape[-1]), None if x is None else rows_first(x, m, shape[-1]),
            weight, a, b, magnitude, norm, t, base, seed, scaling, threshold, x_dtype, needs,
        )  # fmt: skip
        run = (
            BACKWARD.registered if ctx.backend is None else BACKWARD.backends[ctx.backend.name].run
        )
        found = iter(run(*args))
        grads = [next(found) if flag else None for flag in needs]
        if grads[0] is not None:
            grads[0] = grads[0].view(shape)
        if grads[2] is not None:
            grads[2] = grads[2].to(bias_dtype)
        return (*grads, None, None, None, None, None, None)


def dora_linear(
    x: Tensor,  # [*, K]
    weight: Tensor,  # [N, K]
    a: Tensor,  # [R, K]
    b: Tensor,  # [N, R]
    magnitude: Tensor,  # [N]
    *,
    bias: Tensor | None = None,  # [N]
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    weight_norm: Tensor | None = None,  # [N]
) -> Tensor:
    """A linear layer whose weight rows are ``magnitude (weight + scaling b a) / norm``, [*, N].

    Args:
        x: [*, K], fp32, bf16 or fp16 (fp64 on the reference backend).
        weight: [N, K], of the dtype of x outside autocast; frozen or trained.
        a, b, magnitude: [R, K], [N, R], [N], of any float dtype.
        bias: [N] or None.
        dropout_p: probability in [0, 1) to drop an element of the adapter's input.
        seed: 0-d int64 tensor that fixes the mask; drawn from torch's generator if None.
        weight_norm: [N], what :func:`dora_weight_norm` returned, if it is known already.

    Returns:
        [*, N] in the dtype of x or, under autocast, in autocast's. The norm gets no gradient.

    Raises:
        TypeError: an argument is no float tensor, or x and weight differ in dtype outside autocast.
        ValueError: shapes or devices do not fit, or ``dropout_p`` is outside [0, 1).
    """
    check_float("x", x)
    check_shape("weight", weight, (None, x.shape[-1]), x.device)
    outputs = weight.shape[0]
    check_shape("a", a, (None, x.shape[-1]), x.device)
    check_shape("b", b, (outputs, a.shape[0]), x.device)
    check_shape("magnitude", magnitude, (outputs,), x.device)
    for name, given in (("bias", bias), ("weight_norm", weight_norm)):
        if given is not None:
            check_shape(name, given, (outputs,), x.device)
    autocast = _torch.autocast_dtype(x.device.type)
    if autocast is None and weight.dtype != x.dtype:
        raise TypeError(f"weight: expected x's dtype {x.dtype}, got {weight.dtype}")
    factors = (a, b, magnitude, autocast or x.dtype)
    return apply_dora(
        x,
        weight,
        *factors,
        bias=bias,
        scaling=scaling,
        dropout_p=dropout_p,
        seed=seed,
        weight_norm=weight_norm,
    )


def apply_dora(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    compute_dtype: torch.dtype,
    *,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None = None,
    weight_norm: Tensor | None = None,
    second_product: bool = False,
) -> Tensor:
    """:func:`dora_linear` without validation, for callers that know their arguments.

    ``second_product``: PEFT computes a base product of its own for the adapter, in its dtype, also
    where nothing is dropped.
    """
    threshold = _dropout.threshold(dropout_p)
    if threshold and seed is None:
        seed = _dropout.draw_seed(x.device)
    exact = (threshold or second_product) and _torch.autocast_dtype(x.device.type) is None
    base_dtype = torch.promote_types(compute_dtype, a.dtype) if exact else compute_dtype
    facts = (weight_norm, seed, scaling, threshold, compute_dtype, base_dtype)
    if _torch.in_functorch():  # plain torch operations compose with vmap and grad
        rows = x.reshape(-1, x.shape[-1])
        y = _dora_linear_reference.forward(rows, weight, bias, a, b, magnitude, *facts, False)[0]
        return y.reshape(*x.shape[:-1], -1)
    y = _DoraLinear.apply(x, weight, bias, a, b, magnitude, *facts)  # type: ignore[no-untyped-call]
    return y  # type: ignore[no-any-return]

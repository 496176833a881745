"""linear_log_probs: log-probabilities of targets under a head, without the logits.

Maths, for each chunk of rows (_chunked_head.py), z = softcap tanh(logit_scale logits / softcap):

    logits = C(h W^T + bias)                                             [rows, V]
    y_i = z_{i, target_i} - logsumexp(z_i)                               fp32, 0 on ignored rows
    dlogits_i = dy_i d y_i / d logits_i, stored as C
    dh = dlogits W,   dW = dlogits^T h,   dbias = sum dlogits

The incoming gradient differs by row and is known only in backward. If only h needs a gradient, its
rows for dy = -1 are computed in the forward, while the logits exist, and backward scales them: they
are all that is saved. If the head trains, the logits are computed a second time in backward: h,
targets and parameters are saved.

Precision: C is the autocast dtype under autocast, else the dtype of h. Everything between the
logits and y is fp32; dW and dbias accumulate in fp32. Each gradient is rounded once to the dtype of
its tensor, dh of a frozen head once more when it is scaled.

Semantics: ``torch.log_softmax`` of upcast logits, gathered at the targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttune import _native, _registry, _torch
from fasttune.ops import _support, _triton
from fasttune.ops._arguments import accumulator, check_float, check_shape
from fasttune.ops._chunked_log_probs import backward_with, forward_with
from fasttune.ops._row_loss import CrossEntropy
from fasttune.ops.linear_cross_entropy import check_targets

_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
_FACTS = "ScalarType compute_dtype, float[] options"


def _forward_fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor]]:
    y = hidden.new_empty(hidden.shape[0], dtype=accumulator(rest[2]))
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return y, [dhidden] if rest[-1] else []


def _backward_fake(gradient: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    bias, needs = rest[0], rest[-1]
    grads = [torch.empty_like(hidden, memory_format=torch.contiguous_format)] if needs[0] else []
    if needs[1]:
        grads.append(weight.new_empty(weight.shape))
    if needs[2]:
        grads.append(bias.new_empty(bias.shape, dtype=accumulator(rest[2])))
    return grads


FORWARD = _registry.define(
    "linear_log_probs_fwd",
    f"({_TENSORS}, {_FACTS}, bool need_dhidden) -> (Tensor, Tensor[])",
    _forward_fake,
)
BACKWARD = _registry.define(
    "linear_log_probs_bwd",
    f"(Tensor gradient, {_TENSORS}, {_FACTS}, bool[] needs) -> Tensor[]",
    _backward_fake,
)


def _formula(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    compute_dtype: torch.dtype,
    options: Sequence[float],
) -> Tensor:
    """With all logits, in plain differentiable torch."""
    wide = accumulator(compute_dtype)
    logits = hidden.to(compute_dtype).to(wide) @ weight.to(compute_dtype).to(wide).t()
    if bias is not None:
        logits = logits + bias.to(wide)
    return -CrossEntropy(int(options[0]), *options[1:]).reference(logits, targets)[0]


def _forward_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    *facts, need_dhidden = rest
    if not need_dhidden:
        return _formula(hidden, weight, bias, *facts), []
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        y = _formula(leaf, weight.detach(), None if bias is None else bias.detach(), *facts)
        return y.detach(), list(torch.autograd.grad(-y.sum(), leaf))


def _backward_reference(gradient: Tensor, *args: Any) -> list[Tensor]:
    *tensors, targets, dtype, options, needs = args
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        hidden, weight, bias = leaves
        assert hidden is not None and weight is not None
        y = _formula(hidden, weight, bias, targets, dtype, options)
        wanted = [t for t, flag in zip(leaves, needs, strict=True) if flag and t is not None]
        grads = list(torch.autograd.grad(y, wanted, gradient)) if wanted else []
    if needs[2]:
        grads[-1] = grads[-1].to(y.dtype)
    return grads


def _cpu_supports(*args: Any) -> str | None:
    return _support.why_not_cpu(args, ())


def _triton_supports(*args: Any) -> str | None:
    return _support.why_not_triton(args, ())


def _with_triton(run: Any, *args: Any) -> Any:
    return run(_triton.head_kernels(), *args)


for _op, _run, _plain in (
    (FORWARD, forward_with, _forward_reference),
    (BACKWARD, backward_with, _backward_reference),
):
    _op.backend("cpu", _cpu_supports)(partial(_run, _native))
    _op.backend("triton", _triton_supports)(partial(_with_triton, _run))
    _op.backend("reference", _support.never)(_plain)


class _LinearLogProbs(torch.autograd.Function):
    """hidden [M, H], the head and targets [M] to y [M]."""

    @staticmethod
    def forward(
        ctx: Any, facts: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Any
    ) -> Any:
        ctx.needs = list(ctx.needs_input_grad[1:4])
        ctx.scales = ctx.needs == [True, False, False]
        args = (hidden, weight, bias, targets, *facts, ctx.scales)
        dispatched = _registry.must_dispatch((hidden, weight, bias))
        ctx.backend = None if dispatched else FORWARD.select(*args)
        y, rows = FORWARD.registered(*args) if ctx.backend is None else ctx.backend.run(*args)
        ctx.save_for_backward(*(rows if ctx.scales else (hidden, weight, bias, targets)))
        ctx.set_materialize_grads(False)
        ctx.saved_bytes = hidden.nbytes + (0 if ctx.scales else targets.nbytes)
        ctx.facts = facts
        return y

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        if gradient is None:
            return (None,) * 5
        saved = ctx.saved_tensors
        if ctx.scales:
            (rows,) = saved
            return None, (rows * -gradient[:, None]).to(rows.dtype), None, None, None
        run = BACKWARD.registered
        if ctx.backend is not None:
            run = BACKWARD.backends[ctx.backend.name].run
        grads = iter(run(gradient.contiguous(), *saved, *ctx.facts, ctx.needs))
        found = [
            next(grads).to(tensor.dtype) if flag else None
            for tensor, flag in zip(saved[:3], ctx.needs, strict=True)
        ]
        return None, *found, None


def linear_log_probs(
    hidden: Tensor,  # [*, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [*] int64
    *,
    bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """log softmax(hidden @ weight.T + bias) at the targets, [*], without holding the logits.

    Args:
        hidden: [*, H] fp32, bf16 or fp16 (fp64 on the reference backend).
        weight: [V, H] in hidden's dtype (any float dtype under autocast); frozen or trained.
        targets: [*] int64 in [0, V), or ``ignore_index``: 0 then, with a gradient of 0.
        bias: [V].
        logit_scale, softcap: as in :class:`fasttune.ops.CrossEntropy`.

    Returns:
        [*] in fp32 (fp64 for fp64).

    Raises:
        TypeError: a dtype does not fit.
        ValueError: shapes, devices or (on the CPU) the range of targets do not fit; on CUDA a
            target out of range trips a device-side assertion, without synchronisation.
    """
    row_loss = CrossEntropy(ignore_index, logit_scale, softcap)
    check_float("hidden", hidden)
    check_shape("weight", weight, (None, hidden.shape[-1]), hidden.device, like="hidden")
    dtype = _torch.autocast_dtype(hidden.device.type)
    if dtype is None and weight.dtype != hidden.dtype:
        raise TypeError(f"weight: expected hidden's dtype {hidden.dtype}, got {weight.dtype}")
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), hidden.device, like="hidden")
    check_targets(targets, hidden.shape[:-1], weight.shape[0], ignore_index)
    options = [float(row_loss.ignore_index), row_loss.logit_scale, row_loss.softcap]
    facts = (dtype or hidden.dtype, options)
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    if _torch.in_functorch():  # plain torch operations compose with vmap and grad
        return _formula(rows, weight, bias, flat, *facts).view(targets.shape)
    apply: Any = _LinearLogProbs.apply
    y: Tensor = apply(facts, rows, weight, bias, flat)
    return y.view(targets.shape)

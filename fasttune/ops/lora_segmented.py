"""lora_segmented: one projection of a batch whose rows belong to different adapters.

Maths. Row m belongs to branch j = rows_of(m), or to none (-1). Products accumulate in fp32:

    t_m = s_j / (1 - p_j) (x_m * keep_jm) A_j^T                               [R_j], fp32, saved
    y_m = x_m W^T + bias + s_j lora_bias_j + t_m B_j^T                        [N]
    y_m = x_m W^T + bias                                                      [N], of a base row

    d_m = s_j / (1 - p_j) dy_m B_j                                            [R_j], fp32
    dx_m = dy_m W + keep_jm * (d_m A_j)                                       [K]
    dA_j = sum_m d_m^T (x_m * keep_jm),  dB_j = sum_m dy_m^T t_m,  over the rows of branch j
    dW = dy^T x,  dbias = sum_m dy_m,  dlora_bias_j = s_j sum_m dy_m over the rows of branch j

W meets the whole batch in one product. A branch sees only its own rows: runs of neighbouring rows
(*segments*, views of x) or, where there are more than MAX_SEGMENTS of them, its rows gathered once
in x's own dtype. In Triton a product of all segments is one launch and nothing is gathered. A
branch without rows gets no gradient (None, not zeros): weight decay must not move an adapter that
is not in the batch.

Saved for backward: x as it came (only if an A or W trains and its producer cannot rebuild it), t
and parameters. The dropout mask of row m of branch j is that of docs/design.md with ``branch`` = j
and ``row`` = m, the row of the whole batch; gathered rows count by their place in the gathering.

Precision (docs/precision.md): as lora_linear where every row has a branch. In a batch with base
rows the base product is torch's own, rounded to C, so that base rows have its bits; branches are
added in fp32 and rounded a second time, as stock does. dA, dB and dlora_bias are summed over
segments in fp32.

Semantics: peft.tuners.lora.layer.LoraLayer._mixed_batch_forward (PEFT 0.21), for training too.
Peers: Punica (Chen et al., 2023), S-LoRA (Sheng et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttune import _registry, _torch
from fasttune.ops import _dropout, _lora_segmented_reference, _recipe
from fasttune.ops._arguments import output_shaped, rows_first
from fasttune.ops._lora_linear_products import Needs
from fasttune.ops._lora_segmented_backends import BACKWARD, FORWARD
from fasttune.ops._lora_segmented_plan import assignment, plan
from fasttune.ops.lora_linear import LoraBranch, LoraProjection, validate


@dataclass(frozen=True)
class _Spec:
    """Everything about a call that is no tensor; ``facts`` in the order of the registered op."""

    scalings: list[float]
    thresholds: list[int]
    ids: list[int]  # of the branches, for their masks
    segments: list[int]  # start, stop, branch of each
    compute_dtype: torch.dtype

    @property
    def facts(self) -> tuple[list[Any], ...]:
        return self.scalings, self.thresholds, self.ids, self.segments


_INPUT = 0  # position of x among the tensor inputs of _LoraSegmented


class _LoraSegmented(torch.autograd.Function):
    """x, seed, order and the tensors of _pack to y."""

    @staticmethod
    def forward(ctx: Any, spec: _Spec, x: Tensor, seed: Any, order: Any, *flat: Any) -> Tensor:
        weight, bias, a, b, lora_biases, scaling_tensors = _unpack(flat)
        rows = rows_first(x, math.prod(x.shape[:-1]), x.shape[-1])
        factors = (a, b, lora_biases, scaling_tensors)
        args = (rows, weight, bias, *factors, *spec.facts, order, seed, spec.compute_dtype)
        if _registry.must_dispatch((x, *flat)):
            ctx.backend = None
            y, ts = FORWARD.registered(*args)
        else:
            ctx.backend = FORWARD.select(*args)
            y, ts = ctx.backend.run(*args)
        needs = [ctx.needs_input_grad[1], *ctx.needs_input_grad[4 : 6 + 3 * len(a)]]
        need = Needs.unpack(needs, 1, len(a))
        need_input = any(need.a) or need.w[0]
        ctx.recipe = need_input and not torch.compiler.is_compiling() and _recipe.available(x)
        keep_input = need_input and not ctx.recipe
        kept = [t if need.b[j] else None for t, j in zip(ts, spec.segments[2::3], strict=True)]
        ctx.save_for_backward(
            x if keep_input else None,
            seed,
            order,
            weight if need.x or need.w[0] else None,
            *(*a, *b, *scaling_tensors, *kept),
        )
        ctx.set_materialize_grads(False)
        ctx.saved_bytes = sum(t.numel() * t.element_size() for t in kept if t is not None)
        ctx.saved_bytes += x.numel() * x.element_size() if keep_input else 0
        ctx.spec, ctx.needs, ctx.shape, ctx.x_dtype = spec, needs, x.shape, x.dtype
        ctx.bias_dtypes = [None if f is None else f.dtype for f in (bias, *lora_biases)]
        return output_shaped(y, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        spec: _Spec = ctx.spec
        k = len(spec.scalings)
        if dy is None:
            return (None,) * (6 + 4 * k)
        x, seed, order, weight, *saved = ctx.saved_tensors
        if ctx.recipe:
            x = _recipe.rebuild(ctx, _INPUT)
        a, b, scaling_tensors, ts = (
            saved[:k],
            saved[k : 2 * k],
            saved[2 * k : 3 * k],
            saved[3 * k :],
        )
        rows = math.prod(ctx.shape[:-1])
        args = (
            rows_first(dy, rows, dy.shape[-1]),
            None if x is None else rows_first(x, rows, ctx.shape[-1]),
            *(weight, a, b, ts, scaling_tensors, *spec.facts, order, seed),
            *(ctx.x_dtype, ctx.needs),
        )
        run = (
            BACKWARD.registered if ctx.backend is None else BACKWARD.backends[ctx.backend.name].run
        )
        grads = iter(run(*args))
        dx, dw, dbias, *rest = [next(grads) if flag else None for flag in ctx.needs]
        if dx is not None:
            dx = dx.view(ctx.shape)
        dbias, *dlora_biases = [
            grad if grad is None else grad.to(dtype)
            for grad, dtype in zip((dbias, *rest[2 * k :]), ctx.bias_dtypes, strict=True)
        ]
        return (None, dx, None, None, dw, dbias, *rest[: 2 * k], *dlora_biases, *(None,) * k)


def _unpack(flat: Sequence[Any]) -> tuple[Any, Any, list[Any], list[Any], list[Any], list[Any]]:
    """weight, bias, and a, b, lora bias and scaling tensor of every branch."""
    weight, bias, *rest = flat
    k = len(rest) // 4
    return weight, bias, rest[:k], rest[k : 2 * k], rest[2 * k : 3 * k], rest[3 * k :]


def lora_segmented(
    x: Tensor,  # [*, K]
    weight: Tensor,  # [N, K]
    branches: Sequence[LoraBranch],
    rows_of: Tensor | Sequence[int],  # [B] or [M]
    *,
    bias: Tensor | None = None,  # [N]
    seed: Tensor | None = None,
) -> Tensor:
    """x W^T + bias, [*, N], plus for every row the LoRA branch that it is assigned to.

    Args:
        x: [*, K], fp32, bf16, fp16 (fp64 on the reference backend), any leading shape, also empty.
            M is the number of its rows, B its first dimension.
        weight: [N, K], on the device of x; outside autocast of its dtype.
        branches: the adapters, of any number, ranks, float dtypes, scalings and dropouts.
        rows_of: int64, the index of the branch of every row, or -1 for a base row: one entry for
            each of the M rows, or one for each of the B samples, whose M / B rows then share it. A
            tensor on a GPU is read with a synchronisation; a list is not. In any order, but more
            than MAX_SEGMENTS runs of equal entries cost a copy of their rows, except in Triton.
        bias: [N].
        seed: 0-d int64 tensor on the device of x that fixes the dropout masks; drawn from torch's
            generator of the device if None and a branch that has rows has dropout.

    Returns:
        [*, N] in x's dtype or, under autocast, in autocast's. Base rows have the bits of
        ``torch.nn.functional.linear`` on the whole batch. In backward the parameters of a branch
        without rows get no gradient.

    Raises:
        TypeError: an argument is no tensor, has no float dtype, x and weight differ in dtype
            outside autocast, or rows_of holds no integers.
        ValueError: shapes or devices do not fit, a dropout probability is outside [0, 1), or
            rows_of has another length or names no branch, or a branch scales its ranks or
            outputs.

    Semantics: ``LoraLayer._mixed_batch_forward`` of PEFT 0.21.
    """
    dtype = validate(x, [LoraProjection(weight, bias, tuple(branches))], seed)
    for branch in branches:
        branch.refuse_scales()
    rows = math.prod(x.shape[:-1])
    given = assignment(rows_of, x.shape[0] if x.dim() > 1 else 1, rows, len(branches))
    return apply_segmented(x, weight, branches, given, dtype, bias=bias, seed=seed)


def apply_segmented(
    x: Tensor,
    weight: Tensor,
    branches: Sequence[LoraBranch],
    given: Sequence[int],
    compute_dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """:func:`lora_segmented` without validation, for callers that know their arguments."""
    chosen = plan(given, math.prod(x.shape[:-1]))
    used = [branches[index] for index in chosen.used]
    scales = [branch.scaling for branch in used]
    spec = _Spec(
        [1.0 if isinstance(scale, Tensor) else float(scale) for scale in scales],
        [_dropout.threshold(branch.dropout_p) for branch in used],
        list(chosen.used),
        [number for segment in chosen.segments for number in segment],
        compute_dtype,
    )
    flat: list[Any] = [weight, bias]
    flat += [branch.a for branch in used]
    flat += [branch.b for branch in used]
    flat += [branch.bias for branch in used]
    flat += [scale if isinstance(scale, Tensor) else None for scale in scales]
    order = None if chosen.order is None else torch.tensor(chosen.order, device=x.device)
    if seed is None and any(spec.thresholds):
        seed = _dropout.draw_seed(x.device)
    if _torch.in_functorch():  # plain torch operations compose with vmap and grad
        x2 = x.reshape(-1, x.shape[-1])
        facts: Any = (*spec.facts, order, seed, compute_dtype)
        y, _ = _lora_segmented_reference.forward(x2, *_unpack(flat), *facts)
        return y.reshape(*x.shape[:-1], y.shape[-1])
    output: Tensor = _LoraSegmented.apply(spec, x, seed, order, *flat)  # type: ignore[no-untyped-call]
    return output

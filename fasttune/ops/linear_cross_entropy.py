"""linear_cross_entropy: hidden states, head weight and targets to the loss, without the logits.

Maths, for each chunk of rows, accumulated in fp32 and rounded to the compute dtype C where marked:

    t_j = s_j / (1 - p_j) (h * keep_j) A_j^T                             [rows, R_j], fp32
    logits = C(h W^T + bias + sum_j t_j B_j^T)                           [rows, V]
    loss_i, g_i = row loss and its gradient by the logits, in fp32; g is stored as C
    dh = g W + sum_j keep_j * (d_j A_j),   d_j = s_j / (1 - p_j) g B_j
    dW += g^T h,  dbias += sum g,  dA_j += d_j^T (h * keep_j),  dB_j += g^T t_j

The gradients are computed in the forward, while a chunk's logits exist, with respect to the *sum*
of the row losses; backward only scales them by the incoming gradient. Weight gradients accumulate
in fp32. Saved for backward: those gradients, nothing else. The row loss is in _row_loss.py.

Chunk: rows whose logits fit the budget in _chunked_head.py, a multiple of 64. Rows whose target
is ignore_index are dropped before the head on the CPU, where that needs no synchronisation (not
when the head's LoRA has dropout, whose mask counts rows).

Precision: C is the autocast dtype under autocast, else the dtype of the hidden states, as the
logits of stock; LoRA factors are never rounded.

Semantics: torch.nn.functional.cross_entropy on upcast logits, as
transformers.loss.loss_utils.ForCausalLMLoss (5.23). Peers: Cut Cross-Entropy (Wijmans et al.,
2024), Liger Kernel (Hsu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttune import _native, _registry, _torch
from fasttune.ops import _dropout, _support, _triton
from fasttune.ops._arguments import accumulator, check_float, check_shape
from fasttune.ops._chunked_head import chunked, stored_dtype
from fasttune.ops._row_loss import CrossEntropy
from fasttune.ops.lora_linear import LoraBranch


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, a: Sequence[Tensor], b:
        Sequence[Tensor],
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    dtype, needs = rest[4], rest[7]
    wide = accumulator(dtype)
    scalars = [hidden.new_empty((), dtype=wide) for _ in range(3)]
    grads = [torch.empty_like(hidden, memory_format=torch.contiguous_format)] if needs[0] else []
    if needs[1]:
        grads.append(weight.new_empty(weight.shape, dtype=stored_dtype(weight.dtype)))
    for factor, flag in zip((bias, *a, *b), needs[2:], strict=True):
        if flag and factor is not None:
            grads.append(factor.new_empty(factor.shape, dtype=wide))
    return scalars[0], scalars[1], scalars[2], grads


FORWARD = _registry.define(
    "linear_cross_entropy_fwd",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor[] a, Tensor[] b, "
    "Tensor?[] scaling_tensors, float[] scalings, int[] thresholds, Tensor? seed, "
    "ScalarType compute_dtype, "
    "float[] options, bool need_stats, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor[])",
    _fake,
)


def _cpu_supports(*args: Any) -> str | None:
    return _support.why_not_cpu(args, args[4])


def _triton_supports(*args: Any) -> str | None:
    return _support.why_not_triton(args, args[4])


@FORWARD.backend("cpu", _cpu_supports)
def _fwd_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    return chunked(_native, *args)


@FORWARD.backend("triton", _triton_supports)
def _fwd_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    return chunked(_triton.head_kernels(), *args)


def _plain_sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling_tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    thresholds: Sequence[int],
    seed: Tensor | None,
    compute_dtype: torch.dtype,
    options: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, correct and entropy sums in plain differentiable torch, with all logits."""
    wide = accumulator(compute_dtype)
    logits = hidden.to(compute_dtype).to(wide) @ weight.to(compute_dtype).to(wide).t()
    if bias is not None:
        logits = logits + bias.to(wide)
    for j, (down, up) in enumerate(zip(a, b, strict=True)):
        keep = _dropout.keep_mask(seed, thresholds[j], *hidden.shape, branch=j)
        scale: float | Tensor = scalings[j] * _dropout.keep_scale(thresholds[j])
        scale_tensor = scaling_tensors[j]
        if scale_tensor is not None:
            scale = scale * scale_tensor.to(wide)
        logits = logits + (hidden.to(wide) * keep) @ down.to(wide).t() @ up.to(wide).t() * scale
    loss, correct, entropy = CrossEntropy(int(options[0]), *options[1:]).reference(logits, targets)
    return loss.sum(), correct.sum(), entropy.sum()


@FORWARD.backend("reference", _support.never)
def _fwd_reference(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    hidden, weight, bias, targets, a, b = args[:6]
    needs = args[13]
    with torch.enable_grad():
        leaves = [
            None if t is None else t.detach().requires_grad_()
            for t in (hidden, weight, bias, *a, *b)
        ]
        k = len(a)
        h, w, bias_leaf, *factors = leaves
        assert h is not None and w is not None
        low, high = (
            [f for f in factors[:k] if f is not None],
            [f for f in factors[k:] if f is not None],
        )
        facts: Any = args[6:12]
        sums = _plain_sums(h, w, bias_leaf, targets, low, high, *facts)
        wanted = [
            leaf for leaf, flag in zip(leaves, needs, strict=True) if flag and leaf is not None
        ]
        grads = list(torch.autograd.grad(sums[0], wanted)) if wanted else []
    wide = sums[0].dtype
    dtypes = [hidden.dtype, stored_dtype(weight.dtype), *[wide] * (1 + 2 * k)]
    kinds = [dtype for dtype, flag in zip(dtypes, needs, strict=True) if flag]
    grads = [grad.to(dtype) for grad, dtype in zip(grads, kinds, strict=True)]
    return sums[0].detach(), sums[1].detach(), sums[2].detach(), grads


# ---------------------------------------------------------------------------- autograd


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden, targets, the head and its LoRA factors to the sums of loss, correct and entropy."""

    @staticmethod
    def forward(ctx: Any, facts: tuple[Any, ...], *tensors: Any) -> Any:
        hidden, targets, seed, weight, bias, *factors = tensors
        scaling_tensors, scalings, thresholds, dtype, options, stats = facts
        k = len(scalings)
        needs_hidden, _, _, *needs_head = ctx.needs_input_grad[1:]
        needs = [needs_hidden, *needs_head]
        args = (
            hidden, weight, bias, targets, factors[:k], factors[k:], list(scaling_tensors),
            list(scalings), list(thresholds), seed, dtype, list(options), stats, needs,
        )  # fmt: skip
        ctx.backend = None if _registry.must_dispatch(tensors) else FORWARD.select(*args)
        run = FORWARD.registered if ctx.backend is None else ctx.backend.run
        loss, correct, entropy, grads = run(*args)
        # torch gives an ignored row a gradient of exactly 0, also where the mean is 0 / 0.
        any_valid = (targets != int(options[0])).any()
        ctx.save_for_backward(any_valid, *grads)
        ctx.saved_bytes = sum(grad.numel() * grad.element_size() for grad in grads)
        ctx.needs = needs
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias, *factors)]
        ctx.mark_non_differentiable(correct, entropy)
        return loss, correct, entropy

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> Any:
        any_valid, *saved_grads = ctx.saved_tensors
        saved = iter(saved_grads)
        gradient = torch.where(any_valid, gradient, torch.zeros_like(gradient))
        grads = [
            (next(saved) * gradient).to(dtype) if flag else None
            for flag, dtype in zip(ctx.needs, ctx.dtypes, strict=True)
        ]
        return None, grads[0], None, None, *grads[1:]


# ---------------------------------------------------------------------------- public function


@dataclass(frozen=True)
class TokenStats:
    """Means over the tokens that are not ignored, 0-d fp32 tensors on the device (no
    synchronisation).

    Attributes:
        accuracy: share of tokens whose target has the largest logit (the lowest index wins a tie).
        entropy: of the predicted distribution, in nats.
        tokens: how many there are.
    """

    accuracy: Tensor
    entropy: Tensor
    tokens: Tensor


def linear_cross_entropy(
    hidden: Tensor,  # [*, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [*] int64
    *,
    bias: Tensor | None = None,  # [V]
    branches: Sequence[LoraBranch] = (),
    row_loss: CrossEntropy | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    return_stats: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Cross-entropy of ``hidden @ weight.T + bias`` against targets, without holding the logits.

    Args:
        hidden: [*, H] fp32, bf16 or fp16 (fp64 on the reference backend).
        weight: [V, H] in hidden's dtype (any float dtype under autocast); frozen or trained.
        targets: [*] int64 in [0, V), or ``row_loss.ignore_index``.
        bias: [V].
        branches: LoRA on the head, as in :func:`fasttune.ops.lora_linear_group`, without LoRA bias.
        row_loss: label smoothing, z-loss, softcap, logit scale and ignore_index; plain
            cross-entropy if None.
        reduction: "mean" over the tokens that are not ignored (NaN if there are none, as torch),
            or "sum".
        num_items_in_batch: divides the sum instead, as transformers does under gradient
            accumulation.
        return_stats: also return token accuracy and entropy.
        seed: 0-d int64 dropout seed of the branches; drawn if None.

    Returns:
        The 0-d fp32 loss, or (loss, TokenStats).

    Raises:
        TypeError: a dtype does not fit.
        ValueError: shapes, devices, the reduction or (on the CPU) the range of targets do not fit;
            on CUDA a target out of range trips a device-side assertion, without synchronisation.
    """
    row_loss = row_loss or CrossEntropy()
    _validate(hidden, weight, targets, bias, branches, row_loss, reduction)
    compute_dtype = _torch.autocast_dtype(hidden.device.type) or hidden.dtype
    sums = apply_head(
        hidden, weight, targets, bias, branches, row_loss, compute_dtype, return_stats, seed
    )
    count = (targets != row_loss.ignore_index).sum()
    loss = sums[0]
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        loss = loss / num_items_in_batch
    elif reduction == "mean":
        loss = loss / count
    if not return_stats:
        return loss
    return loss, TokenStats(sums[1] / count, sums[2] / count, count)


def apply_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    branches: Sequence[LoraBranch],
    row_loss: CrossEntropy,
    compute_dtype: torch.dtype,
    need_stats: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of loss, correct tokens and entropy over all rows, without validation."""
    thresholds = tuple(_dropout.threshold(branch.dropout_p) for branch in branches)
    if seed is None and any(thresholds):
        seed = _dropout.draw_seed(hidden.device)
    scales = [branch.scaling for branch in branches]
    scaling_tensors = tuple(s if isinstance(s, Tensor) else None for s in scales)
    scalings = tuple(1.0 if isinstance(s, Tensor) else float(s) for s in scales)
    options = (
        float(row_loss.ignore_index), row_loss.logit_scale, row_loss.softcap,
        row_loss.label_smoothing, row_loss.z_loss,
    )  # fmt: skip
    hidden2, targets1 = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if hidden2.shape[1] > 1 and hidden2.stride(1) != 1:
        hidden2 = hidden2.contiguous()
    factors = [branch.a for branch in branches], [branch.b for branch in branches]
    if _torch.in_functorch():
        return _plain_sums(
            hidden2, weight, bias, targets1, *factors, scaling_tensors, scalings, thresholds, seed,
            compute_dtype, options,
        )  # fmt: skip
    facts = (scaling_tensors, scalings, thresholds, compute_dtype, options, need_stats)
    apply: Any = _LinearCrossEntropy.apply
    sums: tuple[Tensor, Tensor, Tensor] = apply(
        facts, hidden2, targets1, seed, weight, bias, *factors[0], *factors[1]
    )
    return sums


def _validate(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    branches: Sequence[LoraBranch],
    row_loss: CrossEntropy,
    reduction: str,
) -> None:
    check_float("hidden", hidden)
    check_shape("weight", weight, (None, hidden.shape[-1]), hidden.device)
    if _torch.autocast_dtype(hidden.device.type) is None and weight.dtype != hidden.dtype:
        raise TypeError(f"weight: expected hidden's dtype {hidden.dtype}, got {weight.dtype}")
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), hidden.device)
    for branch in branches:
        check_shape("a", branch.a, (None, hidden.shape[-1]), hidden.device)
        check_shape("b", branch.b, (weight.shape[0], branch.a.shape[0]), hidden.device)
        if branch.bias is not None:
            raise ValueError("branches: expected no LoRA bias on a head, got one; add it to bias")
        branch.refuse_scales()
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    check_targets(targets, hidden.shape[:-1], weight.shape[0], row_loss.ignore_index)


def check_targets(targets: Tensor, shape: Sequence[int], vocab: int, ignore_index: int) -> None:
    """Raises for targets of another shape or dtype, or (CPU) out of range; asserts on the device
    elsewhere.
    """
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets: expected an int64 tensor, got {kind}")
    if targets.shape != torch.Size(shape):
        raise ValueError(f"targets: expected shape {list(shape)}, got {list(targets.shape)}")
    if targets.numel() == 0 or targets.device.type == "meta" or torch.compiler.is_compiling():
        return
    wrong = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    message = f"targets: expected values in [0, {vocab}) or ignore_index {ignore_index}"
    if targets.device.type != "cpu":
        torch._assert_async(~wrong.any(), message)
    elif bool(wrong.any()):
        raise ValueError(f"{message}, got {int(targets[wrong][0])}")

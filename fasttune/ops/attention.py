"""attention: scaled dot-product attention with grouped-query heads.

Maths, for query head h and its kv head g = h // (Hq / Hk), everything in fp32:

    s = scale q k^T + mask                                              [S, T]
    m_i = max_j s_ij,  l_i = sum_j exp(s_ij - m_i),  p_ij = exp(s_ij - m_i) / l_i
    out = p v                                                           [S, D], rounded once

    delta_i = sum_d dout_id out_id,  ds_ij = p_ij ((dout v^T)_ij - delta_i)
    dq = scale ds k,  dk = scale sum_h ds^T q,  dv = sum_h p^T dout     over the heads h of g

Saved for backward: q, k, v, mask, out, m and l; the scores are computed again. Keeping m and l
apart, and not lse = m + log l, keeps gradients right where a mask adds -1e9 or less to a whole row:
there log l is lost beside m (torch's flash kernel of the CPU overestimates those gradients).

A row that may attend to nothing (its mask is False, or -infinity, everywhere) has output 0 and
gives no gradient, as in torch. A row whose additive mask is finite attends somewhere, however low.

Precision: q, k and v have one dtype, autocast's under autocast; out and the gradients have it too.
Nothing else is rounded. Every element has one order of summation, whatever the number of threads.

Semantics: torch.nn.functional.scaled_dot_product_attention(enable_gqa=True) (2.13), without
dropout. Method: FlashAttention-2 (Dao, 2023). On a GPU torch's own flash attention is the one to
call: this op has no kernel there and runs its reference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fasttune import _native, _registry, _torch
from fasttune.ops import _attention_reference, _support
from fasttune.ops._arguments import KERNEL_DTYPES, accumulator, check_float

# ---------------------------------------------------------------------------- backends


def _new_out(q: Tensor) -> Tensor:
    """[B, Hq, S, D] in the memory of [B, S, Hq, D], as a model goes on to read it; no view."""
    heads, queries, width = q.shape[1:]
    strides = (queries * heads * width, width, heads * width, 1)
    return q.new_empty_strided(q.shape, strides)


def _forward_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    row_max, row_sum = (q.new_empty(q.shape[:3], dtype=accumulator(q.dtype)) for _ in range(2))
    return _new_out(q), row_max, row_sum


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any
) -> list[Tensor]:
    return _new_gradients(q, k, v, rest[-1])


def _new_gradients(q: Tensor, k: Tensor, v: Tensor, needs: list[bool]) -> list[Tensor]:
    """In the memory order of their inputs."""
    return [torch.empty_like(t) for t, flag in zip((q, k, v), needs, strict=True) if flag]


FORWARD = _registry.define(
    "attention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    _forward_fake,
)
BACKWARD = _registry.define(
    "attention_bwd",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor row_max, "
    "Tensor row_sum, bool causal, float scale, bool[] needs) -> Tensor[]",
    _backward_fake,
)


def _cpu_supports(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> str | None:
    reason = _support.why_not_cpu((q, k, v, mask), ())
    if reason is None and q.shape[3] > _native.MAX_WIDTH:
        return f"it takes heads of up to {_native.MAX_WIDTH} features, got {q.shape[3]}"
    return reason


def _cpu_supports_backward(dout: Tensor, *args: Any) -> str | None:
    return _cpu_supports(*args)


@FORWARD.backend("cpu", _cpu_supports)
def _fwd_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = _new_out(q)
    stats = _native.attention_forward(q, k, v, mask, causal=causal, scale=scale, out=out)
    return out, *stats


@BACKWARD.backend("cpu", _cpu_supports_backward)
def _bwd_cpu(*args: Any) -> list[Tensor]:
    *tensors, causal, scale, needs = args
    grads = _new_gradients(args[1], args[2], args[3], needs)
    left = iter(grads)
    dq, dk, dv = (next(left) if flag else None for flag in needs)
    _native.attention_backward(*tensors, causal=causal, scale=scale, dq=dq, dk=dk, dv=dv)
    return grads


@FORWARD.backend("reference", _support.never)
def _fwd_reference(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, row_max, row_sum = _attention_reference.forward(*args)
    return _new_out(args[0]).copy_(out), row_max, row_sum


@BACKWARD.backend("reference", _support.never)
def _bwd_reference(*args: Any) -> list[Tensor]:
    *facts, needs = args
    wanted = [
        grad
        for grad, flag in zip(_attention_reference.backward(*facts), needs, strict=True)
        if flag
    ]
    outs = _new_gradients(args[1], args[2], args[3], needs)
    return [out.copy_(grad) for out, grad in zip(outs, wanted, strict=True)]


# ---------------------------------------------------------------------------- autograd


class _Attention(torch.autograd.Function):
    """q, k, v and the mask to the output."""

    @staticmethod
    def forward(
        ctx: Any, causal: bool, scale: float, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        q, k, v = (_unit_stride(t) for t in (q, k, v))
        args = (q, k, v, mask, causal, scale)
        if _registry.must_dispatch((q, k, v, mask)):
            ctx.backend = None
            out, *stats = FORWARD.registered(*args)
        else:
            ctx.backend = FORWARD.select(*args)
            out, *stats = ctx.backend.run(*args)
        ctx.save_for_backward(q, k, v, mask, out, *stats)
        ctx.set_materialize_grads(False)
        kept = [t for t in (q, k, v, mask, out, *stats) if t is not None]
        ctx.saved_bytes = sum(t.numel() * t.element_size() for t in kept)
        ctx.causal, ctx.scale = causal, scale
        result: Tensor = out
        return result

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, dout: Tensor | None) -> Any:
        needs = list(ctx.needs_input_grad[2:5])
        if dout is None or not any(needs):
            return (None,) * 6
        args = (_unit_stride(dout), *ctx.saved_tensors, ctx.causal, ctx.scale, needs)
        run = (
            BACKWARD.registered if ctx.backend is None else BACKWARD.backends[ctx.backend.name].run
        )
        grads = iter(run(*args))
        return None, None, *(next(grads) if flag else None for flag in needs), None


def _unit_stride(x: Tensor) -> Tensor:
    """x with unit stride in the last dimension; a tensor that has another one is copied."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


# ---------------------------------------------------------------------------- public function


def attention(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, Hk, T, D]
    v: Tensor,  # [B, Hk, T, D]
    *,
    mask: Tensor | None = None,  # broadcastable to [B, Hq, S, T]
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v, [B, Hq, S, D].

    Query head h reads kv head h // (Hq // Hk). Any strides; unit stride in D avoids a copy.

    Args:
        q: [B, Hq, S, D], fp32, bf16 or fp16 (fp64 on the reference backend).
        k: [B, Hk, T, D] in q's dtype (any under autocast); Hq is a multiple of Hk.
        v: [B, Hk, T, D], as k.
        mask: bool, True to attend, or float, added to the scores; it gets no gradient. A row that
            may attend to nothing gives 0.
        causal: query i attends to the keys 0 ... i only; then S = T and there is no mask.
        scale: of the scores; 1 / sqrt(D) if None.

    Returns:
        [B, Hq, S, D] in q's dtype (autocast's under autocast), in the memory of [B, S, Hq, D], so
        that ``out.transpose(1, 2).reshape(B, S, Hq * D)`` copies nothing.

    Raises:
        TypeError: an argument is no tensor, or its dtype does not fit.
        ValueError: shapes or devices do not fit, causal comes with a mask or with S != T, or the
            mask requires a gradient.

    Semantics: ``torch.nn.functional.scaled_dot_product_attention`` (2.13) with ``enable_gqa=True``.
    """
    _validate(q, k, v, mask, causal)
    return apply_attention(q, k, v, mask, causal, scale)


def apply_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """:func:`attention` without validation, for callers that know their arguments."""
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    dtype = _torch.autocast_dtype(q.device.type)
    if dtype is not None:
        q, k, v = (t.to(dtype) if t.dtype in KERNEL_DTYPES else t for t in (q, k, v))
    if _torch.in_functorch():  # plain torch operations compose with vmap and grad
        return _attention_reference.forward(q, k, v, mask, causal, scale)[0]
    out: Tensor = _Attention.apply(causal, scale, q, k, v, mask)  # type: ignore[no-untyped-call]
    return out


def _validate(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_float(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(
                f"{name}: expected shape [batch, heads, positions, features], "
                f"got {list(tensor.shape)}"
            )
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q, got {tensor.device}")
        if _torch.autocast_dtype(q.device.type) is None and tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {tensor.dtype}")
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    if (k.shape[0], k.shape[3]) != (batch, width):
        raise ValueError(f"k: expected shape [{batch}, any, any, {width}], got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k {list(k.shape)}, got {list(v.shape)}")
    if width == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"q: expected a multiple of k's {kv_heads} heads and at least one feature, "
            f"got {list(q.shape)}"
        )
    if causal and (mask is not None or queries != keys):
        raise ValueError(
            "causal: expected no mask and as many queries as keys, got "
            + ("a mask" if mask is not None else f"{queries} queries and {keys} keys")
        )
    if mask is not None:
        _validate_mask(mask, (batch, heads, queries, keys), q.device)


def _validate_mask(mask: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        check_float("mask", mask)
    fits = mask.dim() <= 4 and all(
        got in (1, want) for got, want in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"mask: expected a shape that broadcasts to {list(shape)}, got {list(mask.shape)}"
        )
    if mask.device != device:
        raise ValueError(f"mask: expected device {device} as q, got {mask.device}")
    if mask.requires_grad:
        raise ValueError("mask: expected a tensor without requires_grad, got a trained one")

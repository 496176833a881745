"""Scaled dot-product attention, in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune._native._extension import DTYPE_CODES, cpu, scratch, threads

MAX_WIDTH = 256  # features of a head; a block of them is to stay in a core's cache
KEPT_SCRATCH = 1 << 23  # floats; a larger buffer goes back to the allocator


def attention_forward(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, Hk, T, D]
    v: Tensor,  # [B, Hk, T, D]
    mask: Tensor | None,  # broadcastable to [B, Hq, S, T]
    *,
    causal: bool,
    scale: float,
    out: Tensor,  # [B, Hq, S, D], overwritten
) -> tuple[Tensor, Tensor]:
    """Writes out; returns the maximum and the sum of each row [B, Hq, S], fp32."""
    row_max, row_sum = (torch.empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    if out.numel() == 0 or k.shape[2] == 0:
        for result in (out, row_max, row_sum):
            result.zero_()
        return row_max, row_sum
    shape, team = _shape(q, k, causal, scale), threads()
    buffer = _buffer(cpu().attention_forward_scratch(shape, team))
    cpu().attention_forward(
        *(shape, _heads(q), _heads(k), _heads(v), _mask(mask, q, k), _heads(out, mutable=True)),
        *(row_max.data_ptr(), row_sum.data_ptr(), buffer.data_ptr(), team),
    )
    return row_max, row_sum


def attention_backward(
    dout: Tensor,  # [B, Hq, S, D]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    row_max: Tensor,  # [B, Hq, S] fp32, contiguous
    row_sum: Tensor,
    *,
    causal: bool,
    scale: float,
    dq: Tensor | None,  # overwritten, as dk and dv
    dk: Tensor | None,
    dv: Tensor | None,
) -> None:
    """Writes the gradients that are not None."""
    if dout.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            if gradient is not None:
                gradient.zero_()
        return
    shape, team = _shape(q, k, causal, scale), threads()
    buffer = _buffer(cpu().attention_backward_scratch(shape, team))
    cpu().attention_backward(
        *(shape, _heads(q), _heads(k), _heads(v), _mask(mask, q, k), _heads(out), _heads(dout)),
        *(row_max.data_ptr(), row_sum.data_ptr()),
        *(_heads(gradient, mutable=True) for gradient in (dq, dk, dv)),
        *(buffer.data_ptr(), team),
    )


def _shape(q: Tensor, k: Tensor, causal: bool, scale: float) -> Any:
    batch, heads, queries, width = q.shape
    return cpu().AttentionShape(
        batch, heads, k.shape[1], queries, k.shape[2], width, DTYPE_CODES[q.dtype], scale, causal
    )


def _heads(x: Tensor | None, *, mutable: bool = False) -> Any:
    kind = cpu().MutableHeads if mutable else cpu().Heads
    if x is None:
        return kind(0, 0, 0, 0)
    if x.shape[3] > 1 and x.stride(3) != 1:
        raise ValueError(f"expected unit stride in the last dimension, got {x.stride()}")
    return kind(x.data_ptr(), *x.stride()[:3])


def _mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Any:
    if mask is None:
        return cpu().AttentionMask(0, 0, 0, 0, 0, 0, 0)
    mask = mask.expand(*q.shape[:3], k.shape[2])
    kind = 1 if mask.dtype == torch.bool else 2
    return cpu().AttentionMask(
        mask.data_ptr(), *mask.stride(), kind, DTYPE_CODES.get(mask.dtype, 0)
    )


def _buffer(floats: int) -> Tensor:
    if floats > KEPT_SCRATCH:
        return torch.empty(floats, dtype=torch.float32)
    return scratch("attention", 1, floats)

"""The least a training step must do: its matrix products with frozen weights, and attention.

The same products at the same shapes as one step of the SmolLM2-135M scenario, in the compute dtype,
by torch, on real data: forward and gradient by the input of every projection and of the head, and
attention forward and backward by the faster of torch's and ours. Nothing else: no LoRA, no norms.
Every layer has weights of its own, as the model has: they come from memory, not from a cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from families import SMOLLM2
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from training import BATCH, SEQUENCE

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 30, 9, 3, 64
HEAD_ROWS = 256  # rows of logits at a time, so that memory does not show


def products() -> tuple[tuple[int, int], ...]:
    """(in, out) of the seven projections of a layer."""
    hidden, wide = SMOLLM2.hidden, SMOLLM2.intermediate
    square, narrow = (hidden, hidden), (hidden, SMOLLM2.kv)
    return square, narrow, narrow, square, (hidden, wide), (hidden, wide), (wide, hidden)


def attention_step(dtype: torch.dtype, ours: bool) -> Callable[[], object]:
    """Causal attention of one layer, forward and backward."""
    from fasttune.ops import attention

    def projected(heads: int) -> Tensor:
        x = torch.randn(BATCH, SEQUENCE, heads, HEAD_DIM).to(dtype)
        return x.transpose(1, 2).requires_grad_()

    q, k, v = projected(HEADS), projected(KV_HEADS), projected(KV_HEADS)
    dy = torch.randn(BATCH, HEADS, SEQUENCE, HEAD_DIM).to(dtype)

    def step() -> None:
        if ours:
            y = attention(q, k, v, causal=True)
        else:
            y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(y, (q, k, v), dy)

    return step


def gemm_step(dtype: torch.dtype) -> Callable[[], object]:
    """All products of one training step with frozen weights."""
    rows = BATCH * SEQUENCE
    operands = [
        (torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)) for k, n in products()
    ]
    layers = [[torch.randn(n, k).to(dtype) for k, n in products()] for _ in range(LAYERS)]
    head = torch.randn(SMOLLM2.vocabulary, SMOLLM2.hidden).to(dtype)
    hidden = torch.randn(HEAD_ROWS, SMOLLM2.hidden).to(dtype)
    logits = torch.empty(HEAD_ROWS, SMOLLM2.vocabulary, dtype=dtype)

    def step() -> None:
        for weights in layers:
            for (x, _), weight in zip(operands, weights, strict=True):
                torch.mm(x, weight.t())
        for _ in range(rows // HEAD_ROWS):
            torch.mm(hidden, head.t(), out=logits)
            torch.mm(logits, head)
        for weights in reversed(layers):
            for (_, dy), weight in zip(operands, weights, strict=True):
                torch.mm(dy, weight)

    return step


def floor_step(dtype: torch.dtype) -> Callable[[], object]:
    """Products and attention of one training step."""
    gemm, attention = gemm_step(dtype), attention_step(dtype, ours=True)

    def step() -> None:
        gemm()
        for _ in range(LAYERS):
            attention()

    return step

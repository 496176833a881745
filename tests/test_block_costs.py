"""Counted at Llama-3-8B size on meta: one decoder block, stock PEFT against patched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import with_lora
from torch import Tensor, nn

import fasttune
from fasttune.testing.accounting import Counts, count

HIDDEN = 4096


class _Nothing(torch.autograd.Function):
    """Attention's shapes without its cost: allocations count as nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.inputs = [(t.shape, t.dtype, t.device) for t in (q, k, v)]
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return tuple(torch.empty(s, dtype=t, device=d) for s, t, d in ctx.inputs)


class WithoutAttention(nn.Module):
    """A decoder layer without attention itself: its projections and rotary embedding stay."""

    def __init__(self, tokens: int, autocast: bool) -> None:
        super().__init__()
        from transformers import AttentionInterface, LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        def nothing(module, query, key, value, mask, **kwargs):
            return _Nothing.apply(query, key, value), None

        AttentionInterface.register("nothing", nothing)
        config = LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=14336,
            num_hidden_layers=1,
            num_attention_heads=32,
            num_key_value_heads=8,
            attn_implementation="nothing",
        )
        self.layer = LlamaDecoderLayer(config, 0)
        self.tokens, self.autocast = tokens, autocast

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, self.tokens, 128)
        cos, sin = (torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            y = self.layer(x, position_embeddings=(cos, sin))
        return y[0] if isinstance(y, tuple) else y


def counted(tokens: int, patched: bool, autocast: bool) -> Counts:
    with torch.device("meta"):
        block = WithoutAttention(tokens, autocast).to(torch.bfloat16)
    block = with_lora(block, r=16, lora_dropout=0.05).to("meta").train()
    if patched:
        fasttune.patch(block, strict=True)
    x = torch.empty(1, tokens, HIDDEN, dtype=torch.bfloat16, device="meta", requires_grad=True)
    count(block, x)  # the first step finds the groups
    return count(block, x)


@pytest.mark.parametrize(("tokens", "autocast"), [(8192, False), (512, True)])
def test_a_block_needs_fewer_calls_bytes_and_saved_bytes(tokens: int, autocast: bool) -> None:
    stock = counted(tokens, False, autocast)
    ours = counted(tokens, True, autocast)
    assert ours.total.opaque.calls == 0
    calls = ours.calls / stock.calls
    moved = ours.outside_gemm.bytes_moved / stock.outside_gemm.bytes_moved
    saved = ours.saved_bytes / stock.saved_bytes
    print(f"calls {ours.calls} / {stock.calls} = {calls:.2f}, moved {moved:.2f}, saved {saved:.2f}")
    print(f"stock {stock.outside_gemm.bytes_moved / 1e9:.1f} GB, {stock.saved_bytes / 1e9:.2f} GB")
    assert calls <= 0.4
    assert moved <= 0.35
    assert saved <= 0.3

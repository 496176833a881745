"""Counted at Llama-3-8B size on meta: what a patched LoRA layer launches, moves and saves."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, get_peft_model
from tiny_models import with_lora
from torch import nn

import fasttune
from fasttune.ops import linear_cross_entropy
from fasttune.testing.accounting import count

ROWS, WIDTH = 8192, 4096
BF16, FP32 = 2, 4


def layer(dropout: float, patched: bool) -> nn.Module:
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16))
    model = with_lora(base, r=16, target_modules=["0"], lora_dropout=dropout).to("meta").train()
    return fasttune.patch(model, kinds={"lora"}, strict=True) if patched else model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)


def test_nothing_is_opaque(x):
    counts = count(layer(0.05, True), x)
    assert counts.total.opaque.calls == 0
    assert sum(launch.gemm for launch in counts.total.launches) == 2


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_a_lora_layer_needs_fewer_calls_bytes_and_saved_bytes(x, dropout):
    stock, ours = count(layer(dropout, False), x), count(layer(dropout, True), x)
    # The fp32 copy of x and a mask go; t in fp32 stays.
    seed_bytes = 8 if dropout else 0
    assert ours.saved_bytes == ROWS * 16 * FP32 + seed_bytes
    assert ours.saved_bytes < 0.02 * stock.saved_bytes
    assert ours.total.calls < stock.total.calls
    assert ours.total.bytes_moved < 0.5 * stock.total.bytes_moved


def test_the_fused_loss_moves_logits_in_chunks():
    hidden = torch.empty(1024, 576, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(49152, 576, dtype=torch.bfloat16, device="meta")
    targets = torch.empty(1024, dtype=torch.int64, device="meta")
    counts = count(lambda h: linear_cross_entropy(h, weight, targets), hidden)
    assert counts.total.opaque.calls == 0
    assert counts.saved_bytes < 2 * 1024 * 576 * BF16


@pytest.mark.parametrize("feedforward", [True, False])
def test_an_ia3_layer_reads_and_writes_activations_once_each_way(feedforward):
    """What is around the two products: PEFT casts to fp32 and back, keeps the copy, and sums a
    whole product."""

    def made(patched: bool) -> nn.Module:
        with torch.device("meta"):
            base = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16))
            config = IA3Config(
                target_modules=["0"], feedforward_modules=["0"] if feedforward else []
            )
            model = get_peft_model(base, config).to("meta").train()
        return fasttune.patch(model, kinds={"ia3"}, strict=True) if patched else model

    x = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
    stock, ours = count(made(False), x), count(made(True), x)
    assert ours.total.opaque.calls == 0
    assert sum(launch.gemm for launch in ours.total.launches) == 2
    activations = ROWS * WIDTH * BF16

    def around(counts):
        return sum(
            launch.bytes_read + launch.bytes_written
            for launch in counts.total.launches
            if not launch.gemm
        )

    # y or its like: read and written; then dy and x read, dx written.
    assert 5 * activations < around(ours) < 5.1 * activations
    assert around(stock) > 14 * activations
    # x is an argument; the output of the base layer is kept once.
    assert ours.saved_bytes == (0 if feedforward else activations)
    assert stock.saved_bytes >= (2 if feedforward else 1) * activations

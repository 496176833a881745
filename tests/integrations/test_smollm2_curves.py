"""SmolLM2 on real text: the loss curve of a patched model against that of stock."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fasttune
from fasttune.demo.encode import collate, split_samples, training_order
from fasttune.demo.model import add_lora, find_model, load_model, load_tokenizer
from fasttune.demo.options import DemoError, DemoOptions

pytestmark = pytest.mark.slow
STEPS, BATCH = 50, 4


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    from fasttune.demo.data import load_data

    try:
        tokenizer = load_tokenizer(find_model(None))
        split = split_samples(
            tokenizer, load_data(DemoOptions()), seq_len=128, packing=False, seed=0
        )
    except DemoError as error:
        pytest.fail(str(error))
    order = training_order(split.train, STEPS * BATCH, seed=0)
    return [collate(order[i : i + BATCH], 0) for i in range(0, len(order), BATCH)]


@pytest.fixture(scope="module")
def base() -> nn.Module:
    model: nn.Module = load_model(find_model(None), dtype="bfloat16", device="cpu")
    return model


def curve(
    base: nn.Module, batches: list[dict[str, Tensor]], *, dropout: float, seed: int, patched: bool
) -> Tensor:
    """The loss of each step of a fresh adapter; the base model is as before afterwards."""
    model = add_lora(base, seed=0).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    if patched:
        fasttune.patch(model, strict=True)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    if patched:
        fasttune.unpatch(model)
    model.unload()
    return torch.stack(losses)


def test_without_dropout_every_step_is_within_one_percent(base, batches):
    stock = curve(base, batches, dropout=0.0, seed=1, patched=False)
    ours = curve(base, batches, dropout=0.0, seed=1, patched=True)
    deviation = ((ours - stock).abs() / stock).max()
    print(f"largest relative deviation of a step's loss: {float(deviation):.2e}")
    assert float(deviation) <= 1e-2
    assert float(ours[-10:].mean()) < float(ours[:10].mean())


def test_with_dropout_it_differs_no_more_than_three_stock_seeds(base, batches):
    stock = [curve(base, batches, dropout=0.05, seed=seed, patched=False) for seed in range(3)]
    ours = curve(base, batches, dropout=0.05, seed=0, patched=True)
    between = max(float((a - b).abs().mean()) for a in stock for b in stock)
    distance = sum(float((ours - other).abs().mean()) for other in stock) / 3
    print(f"mean distance: to stock {distance:.4f}, between stock seeds at most {between:.4f}")
    assert distance <= between

"""requires_grad may flip at any time: gradients stay stock's, and only what is needed is saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import gradients, relative, tiny_llama, with_lora
from torch import Tensor, nn

import fasttune

PARTS = {
    "norms": lambda name: "norm" in name,
    "a block": lambda name: "layers.1." in name,
    "the base weights of one projection": lambda name: "layers.0.mlp.up_proj.base" in name,
    "the head and the embedding": lambda name: "embed" in name or "lm_head" in name,
    "everything": lambda name: True,
}


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 499, (2, 40), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def step(model: nn.Module) -> dict[str, Tensor]:
    loss = model(**batch()).loss
    loss.backward()
    result = {"loss": loss.detach(), **gradients(model)}
    model.zero_grad(set_to_none=True)
    return result


def unfreeze(model: nn.Module, part: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or part(name))


def saved_bytes(model: nn.Module) -> int:
    """Bytes that the autograd graph of a step keeps, parameters excluded, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch()).loss.backward()
    model.zero_grad(set_to_none=True)
    return sum(kept.values())


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_flipping_requires_grad_during_training_stays_exact(tied: bool) -> None:
    stock = with_lora(tiny_llama(tie_word_embeddings=tied)).train()
    ours = fasttune.patch(with_lora(tiny_llama(tie_word_embeddings=tied)).train(), strict=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (stock, ours)]
    for part in (*PARTS.values(), lambda name: False, PARTS["a block"]):
        results = []
        for model, optimizer in zip((stock, ours), optimizers, strict=True):
            unfreeze(model, part)
            loss = model(**batch()).loss
            loss.backward()
            results.append({"loss": loss.detach(), **gradients(model)})
            optimizer.step()
            optimizer.zero_grad()
        expected, found = results
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert relative(found[name], value) < 2e-5, name


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
def test_a_frozen_part_has_no_gradient_and_costs_nothing(part: Any) -> None:
    model = fasttune.patch(with_lora(tiny_llama()).train(), strict=True)
    unfreeze(model, lambda name: False)
    frozen = saved_bytes(model)
    found = step(model)
    assert all("lora_" in name or name == "loss" for name in found)
    unfreeze(model, part)
    assert saved_bytes(model) >= frozen
    assert len(step(model)) > len(found)
    unfreeze(model, lambda name: False)
    assert saved_bytes(model) == frozen


def test_a_trained_norm_saves_no_more_than_a_frozen_one() -> None:
    model = fasttune.patch(with_lora(tiny_llama()).train(), strict=True)
    unfreeze(model, lambda name: False)
    frozen = saved_bytes(model)
    unfreeze(model, lambda name: name.endswith("layers.1.input_layernorm.weight"))
    assert saved_bytes(model) == frozen  # its input and statistics are kept for dx already


def test_the_inputs_of_projections_are_rebuilt_not_kept() -> None:
    model = with_lora(tiny_llama()).train()
    fasttune.patch(model, kinds={"lora", "loss"})
    kept = saved_bytes(model)
    fasttune.patch(model)
    rows, hidden, wide, layers = 80, 64, 96, 2
    # Two normed inputs and the hidden state of the MLP, per layer, at the least.
    assert kept - saved_bytes(model) >= layers * rows * (2 * hidden + wide) * 4


def test_a_call_without_gradients_counts_as_fused() -> None:
    model = fasttune.patch(with_lora(tiny_llama()).train(), strict=True)
    model.requires_grad_(False)
    model(**batch())
    report = fasttune.report(model)
    assert report["lora"].fused == 14 and report["lora"].pending == 0

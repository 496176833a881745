"""Learning rates that fall from the head to the embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import loss_of, tiny_llama, with_lora
from torch import nn

from fasttune.optim import AdamW, layerwise_lr_groups


def test_learning_rates_fall_from_the_head_to_the_embeddings() -> None:
    model = tiny_llama(num_hidden_layers=3)
    groups = layerwise_lr_groups(model, 1e-3, 0.5, weight_decay=0.1)
    lr = {name: group["lr"] for group in groups for name, _ in group["params"]}
    decay = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert lr["lm_head.weight"] == lr["model.norm.weight"] == 1e-3
    for block in range(3):
        assert lr[f"model.layers.{block}.mlp.up_proj.weight"] == 1e-3 * 0.5 ** (3 - block)
    assert lr["model.embed_tokens.weight"] == 1e-3 * 0.5**4
    assert decay["model.layers.0.mlp.up_proj.weight"] == 0.1
    assert decay["model.layers.0.input_layernorm.weight"] == 0.0
    assert len(lr) == len(list(model.named_parameters()))
    assert [group["level"] for group in groups] == sorted(group["level"] for group in groups)
    optimizer = AdamW(groups)
    loss_of(model, 0).backward()
    optimizer.step()
    assert set(optimizer.monitor()) == set(lr)


def test_other_architectures_have_levels_too() -> None:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTForImageClassification,
    )

    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    bert = BertForSequenceClassification(BertConfig(num_hidden_layers=2, **small))
    vit = ViTForImageClassification(
        ViTConfig(num_hidden_layers=2, image_size=16, patch_size=8, **small)
    )
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, vocab_size=99)
    )
    blocks = {"layer.0.": 1, "layer.1.": 2, "classifier": 3}
    expected = {
        bert: {"word_embeddings": 0, **blocks},
        vit: {"patch_embeddings": 0, "layers.0.": 1, "layers.1.": 2, "classifier": 3},
        t5: {
            "shared": 0,
            **{f"encoder.block.{i}.": i + 1 for i in range(2)},
            **{f"decoder.block.{i}.": i + 3 for i in range(2)},
        },
    }
    for model, parts in expected.items():
        levels = {
            name: group["level"]
            for group in layerwise_lr_groups(model, 1e-3, 0.9)
            for name, _ in group["params"]
        }
        for part, level in parts.items():
            found = {own for name, own in levels.items() if part in name}
            assert found == {level}, (type(model).__name__, part, found)


def test_lora_plus_gives_b_its_own_rate() -> None:
    model = with_lora(tiny_llama())
    groups = layerwise_lr_groups(model, 1e-3, 1.0, lora_plus_ratio=16.0, trainable_only=True)
    rates = {name: group["lr"] for group in groups for name, _ in group["params"]}
    assert rates and all(("lora_" in name) for name in rates)
    assert all(rate == (16e-3 if "lora_B" in name else 1e-3) for name, rate in rates.items())


def test_lora_on_an_embedding_is_lowest_and_its_b_is_faster() -> None:
    model = with_lora(tiny_llama(), target_modules=["embed_tokens", "q_proj"])
    groups = layerwise_lr_groups(model, 1e-3, 0.5, lora_plus_ratio=16.0, trainable_only=True)
    found = {
        name.partition(".lora_")[2]: (group["level"], group["lr"])
        for group in groups
        for name, _ in group["params"]
        if "embed_tokens" in name
    }
    assert found == {
        "embedding_A.default": (0, 1e-3 * 0.5**3),
        "embedding_B.default": (0, 16e-3 * 0.5**3),
    }


def test_only_the_outermost_lists_of_one_class_are_stacks() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"parts": nn.ModuleList(nn.Linear(2, 2) for _ in range(2))})

    late = nn.Parameter(torch.zeros(2, 3))
    model = nn.ModuleDict(
        {
            "mixed": nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)]),
            "blocks": nn.ModuleList(block() for _ in range(11)),
            "head": nn.Linear(2, 2),
            "late": nn.Embedding(3, 2),
            "lora": nn.ModuleDict({"lora_embedding_A": nn.ParameterDict({"default": late})}),
        }
    )
    groups = layerwise_lr_groups(model, 1e-3, 0.9)
    levels = {name: group["level"] for group in groups for name, _ in group["params"]}
    assert groups[-1]["level"] == 12 and groups[-1]["lr"] == 1e-3
    lowest_or_head = {"mixed": 0, "head": 12, "late": 0, "lora": 0}
    assert len(levels) == 4 + 11 * 4 + 2 + 2
    for name, level in levels.items():
        top, index = name.split(".")[:2]
        assert level == (int(index) + 1 if top == "blocks" else lowest_or_head[top]), name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("no model", 1e-3, 0.9), TypeError, "model: expected a torch.nn.Module, got str"),
        ((nn.Linear(2, 2), 1e-3, 0.9), ValueError, "model: expected a list of two or more blocks"),
        ((nn.Linear(2, 2), -1.0, 0.9), ValueError, "lr: expected a positive number"),
        ((nn.Linear(2, 2), 1e-3, 1.5), ValueError, "decay: expected a number in"),
    ],
)
def test_wrong_arguments_of_layerwise_groups_are_named(
    arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        layerwise_lr_groups(*arguments)

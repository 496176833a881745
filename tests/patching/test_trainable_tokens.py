"""PEFT's trainable tokens without a copy of the embedding: stock against patched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from tiny_models import gradients, relative, tiny_llama
from torch import Tensor, nn

import fasttune
from fasttune.ops import embedding_with_rows, linear_with_rows
from fasttune.testing import accounting

INDICES = [7, 3, 498]


def build(tied: bool = False, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    base = tiny_llama(tie_word_embeddings=tied).to(dtype)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        trainable_token_indices={"embed_tokens": INDICES},
        **changes,
    )
    torch.manual_seed(1)
    model = get_peft_model(base, config).train()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, 499, (2, 23), generator=torch.Generator().manual_seed(3))
    ids[0, :6] = torch.tensor([7, 3, 498, 7, 7, 0])
    return {"input_ids": ids, "labels": ids.clone()}


def step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_equal_stock(tied: bool) -> None:
    stock, model = build(tied), fasttune.patch(build(tied))
    assert list(model.state_dict()) == list(stock.state_dict())
    expected, ours = step(stock, tokens()), step(model, tokens())
    assert ours.keys() == expected.keys()
    (delta,) = (name for name in ours if "trainable_tokens_delta" in name)
    assert ours[delta].shape == (3, 64)
    assert float(ours[delta].norm(dim=1).min()) > 0
    for name, value in expected.items():
        assert relative(ours[name], value) < 2e-5, name
    assert fasttune.report(model)["tokens"].fused == 1 + tied
    assert not fasttune.report(model)["tokens"].original
    fasttune.unpatch(model)
    again = step(model, tokens())
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_bf16_is_bit_equal_in_the_embedding() -> None:
    stock, model = build(dtype=torch.bfloat16), fasttune.patch(build(dtype=torch.bfloat16))
    ids = tokens()["input_ids"]
    layers = [m.base_model.model.model.embed_tokens for m in (stock, model)]
    assert torch.equal(layers[1](ids), layers[0](ids))


def test_control_and_saving_are_those_of_peft(tmp_path: Any) -> None:
    stock, model = build(), fasttune.patch(build())
    for each in (stock, model):
        with each.disable_adapter():
            each.base_model.model.model.embed_tokens(tokens()["input_ids"])
    embeddings = [m.base_model.model.model.embed_tokens for m in (stock, model)]
    ids = tokens()["input_ids"]
    for merged in (True, False):
        for each in (stock, model):
            each.merge_adapter() if merged else each.unmerge_adapter()
        assert torch.equal(embeddings[1](ids), embeddings[0](ids))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(loaded.base_model.model.model.embed_tokens(ids), embeddings[0](ids))


def test_the_method_on_its_own_and_a_padding_token() -> None:
    def made() -> Any:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Embedding(50, 8, padding_idx=4), nn.Linear(8, 50))
        config = TrainableTokensConfig(target_modules=["0"], token_indices=[4, 9])
        return get_peft_model(base, config).train()

    stock, model = made(), fasttune.patch(made(), strict=True)
    ids = torch.tensor([[4, 9, 1, 9]])
    for each in (stock, model):
        each(ids).square().sum().backward()
    ours, expected = gradients(model), gradients(stock)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, rtol=1e-6), name
    (delta,) = (value for name, value in ours.items() if "delta" in name)
    assert not delta[0].any() and delta[1].any()
    assert fasttune.report(model)["tokens"].fused == 1


def test_a_trained_embedding_gets_both_gradients() -> None:
    stock, model = build(), fasttune.patch(build())
    for each in (stock, model):
        layer = each.base_model.model.model.embed_tokens.token_adapter
        layer.base_layer.weight.requires_grad_(True)
    expected, ours = step(stock, tokens()), step(model, tokens())
    assert any("embed_tokens.token_adapter.base_layer" in name for name in ours)
    for name, value in expected.items():
        assert relative(ours[name], value) < 2e-5, name


def test_what_is_not_covered_takes_peft_s_forward() -> None:
    model = fasttune.patch(build())
    layer = model.base_model.model.model.embed_tokens.token_adapter
    layer.base_layer.max_norm = 1.0
    step(model, tokens())
    assert "max_norm" in next(iter(fasttune.report(model)["tokens"].original))


def test_no_copy_of_the_embedding_is_made() -> None:
    """Counted at V 128k x D 4096: memory of a step at least five times below stock's."""
    vocabulary, features, rows = 128_000, 4096, 8
    weight = torch.empty(vocabulary, features, dtype=torch.bfloat16, device="meta")
    delta = torch.empty(rows, features, device="meta", requires_grad=True)
    ids = torch.empty(512, dtype=torch.int64, device="meta")

    def stock() -> Tensor:
        index = torch.empty(rows, dtype=torch.int64, device="meta")
        whole = weight.index_copy(0, index, delta.to(weight.dtype))
        return nn.functional.embedding(ids, whole)

    def ours() -> Tensor:
        return embedding_with_rows(ids, weight, delta, list(range(rows)))

    theirs, mine = accounting.count(stock), accounting.count(ours)
    assert theirs.bytes_moved > 4 * vocabulary * features  # copied, and a dense gradient
    assert mine.bytes_moved < theirs.bytes_moved / 50


def test_wrong_arguments() -> None:
    weight, rows, ids = torch.randn(9, 4), torch.randn(2, 4), torch.tensor([1])
    with pytest.raises(ValueError, match=r"rows: expected shape \(1, 4\)"):
        embedding_with_rows(ids, weight, rows, [1])
    with pytest.raises(ValueError, match=r"different ones in \[0, 9\)"):
        linear_with_rows(torch.randn(3, 4), weight, rows, [1, 9])
    with pytest.raises(ValueError, match="different ones"):
        embedding_with_rows(ids, weight, rows, [2, 2])


def test_linear_with_rows_in_fp64() -> None:
    weight = torch.randn(9, 4, dtype=torch.float64)
    x, rows = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 4), (2, 4)))
    assert torch.autograd.gradcheck(lambda x, r: linear_with_rows(x, weight, r, [7, 2]), (x, rows))
    whole = weight.index_copy(0, torch.tensor([7, 2]), rows.detach())
    assert torch.allclose(linear_with_rows(x, weight, rows, [7, 2]), x @ whole.t())

"""The loss without logits: exact for every causal family, and every rule of LazyLogits."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from tiny_models import gradients, relative, tiny_llama, with_lora
from torch import Tensor, nn

import fasttune
from fasttune.patching.lazy_logits import LazyLogits

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "mistral": _SMALL,
    "qwen2": _SMALL,
    "qwen3": _SMALL,
    "gemma": _SMALL,
    "gemma2": _SMALL,
    "gemma3_text": _SMALL,
    "phi3": _SMALL,
    "phi": _SMALL,
    "cohere": _SMALL,
    "granite": {**_SMALL, "logits_scaling": 8.0},
    "stablelm": _SMALL,
    "starcoder2": _SMALL,
    "nemotron": _SMALL,
    "glm4": _SMALL,
    "olmo2": _SMALL,
    "smollm3": _SMALL,
    "gpt_neox": _SMALL,
    "gpt2": {
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 4,
        "vocab_size": 99,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 99, "rotary_dim": 4},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 99,
        "word_embed_proj_dim": 32,
    },
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 99},
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 99,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 99, "state_size": 8},
    "mixtral": {**_SMALL, "num_local_experts": 4, "output_router_logits": True},
    "qwen3_moe": {
        **_SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "gpt_oss": {**_SMALL, "num_local_experts": 4},
    "olmoe": {**_SMALL, "num_experts": 4, "num_experts_per_tok": 2},
}


def build(family: str) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[family](**FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in vars(config):
        if "dropout" in name or name.endswith("pdrop"):
            setattr(model.config, name, 0.0)
    for module in model.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_stock_without_logits(family: str, items: int | None) -> None:
    tokens = torch.randint(3, 99, (3, 20))
    labels = tokens.clone()
    labels[:, :4] = -100
    stock, model = build(family), fasttune.patch(build(family))
    extra = {} if items is None else {"num_items_in_batch": items}
    theirs = stock(input_ids=tokens, labels=labels, **extra)
    ours = model(input_ids=tokens, labels=labels, **extra)
    assert relative(ours.loss.detach(), theirs.loss.detach()) < 2e-6
    theirs.loss.backward()
    ours.loss.backward()
    expected = gradients(stock)
    for name, gradient in gradients(model).items():
        assert float((gradient - expected[name]).abs().max()) < 2e-6 * max(
            1.0, float(expected[name].abs().max())
        ), name
    assert fasttune.report(model)["loss"].fused == 1, fasttune.explain(model)
    logits = ours.get("logits")
    assert isinstance(logits, LazyLogits)
    assert torch.allclose(logits.materialize(), theirs.logits, atol=2e-6)


@pytest.fixture
def model() -> nn.Module:
    return fasttune.patch(with_lora(tiny_llama()).train())


def test_logits_are_the_real_ones_when_read(model, batch):
    stock = with_lora(tiny_llama()).train()
    expected = stock(**batch).logits
    logits = model(**batch).logits
    assert logits.shape == expected.shape
    assert torch.allclose(logits[:, -1], expected[:, -1], atol=1e-6)
    assert torch.allclose(torch.softmax(logits, -1), expected.softmax(-1), atol=1e-6)
    assert torch.allclose(logits.argmax(-1).float(), expected.argmax(-1).float())
    assert torch.allclose(logits + 1, expected + 1, atol=1e-6)


def test_logits_first_read_under_no_grad_keep_their_gradient(model, batch):
    logits = model(**batch).logits
    with torch.no_grad():
        assert not logits.materialize().requires_grad
    real = logits.materialize()
    assert real.requires_grad
    real.sum().backward()
    assert gradients(model)


def test_autocast_is_re_entered(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch).logits
    assert logits.materialize().dtype == torch.bfloat16
    assert logits.dtype == torch.float32  # accelerate upcasts what says it is 16-bit


def test_reading_after_the_head_was_updated_raises(batch):
    model = fasttune.patch(tiny_llama().train())
    out = model(**batch)
    out.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match=r"fasttune.patch\(model, fused_loss=False\)"):
        out.logits.materialize()


def test_a_frozen_head_can_be_read_after_the_step(model, batch):
    out = model(**batch)
    before = with_lora(tiny_llama()).train()(**batch).logits
    out.loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    assert torch.allclose(out.logits.materialize(), before, atol=1e-6)


def test_writing_into_the_logits_before_the_loss_counts(batch):
    """A model that masks a token before the loss gets the loss of the masked logits."""

    class Masking(type(tiny_llama())):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            from transformers.modeling_outputs import CausalLMOutputWithPast

            hidden = self.model(input_ids=input_ids).last_hidden_state
            logits = self.lm_head(hidden)
            logits[..., 7] = -1e4
            loss = self.loss_function(logits, labels, self.config.vocab_size)
            return CausalLMOutputWithPast(loss=loss, logits=logits)

    stock = tiny_llama().train()
    stock.__class__ = Masking
    model = fasttune.patch(copy.deepcopy(stock))
    inputs = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    assert torch.allclose(model(**inputs).loss, stock(**inputs).loss, rtol=1e-6)
    reasons = fasttune.report(model)["loss"].original
    assert list(reasons) == ["the model used the logits before the loss (an in-place write)"]


def test_another_loss_function_is_left_alone(batch):
    model = tiny_llama().train()
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    fasttune.patch(model)
    assert "not transformers' causal" in next(iter(fasttune.report(model)["loss"].original))
    assert isinstance(model(**batch).logits, Tensor)


def test_replaced_loss_function_after_patch_is_used(batch, caplog):
    model = fasttune.patch(tiny_llama().train())
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    with caplog.at_level(logging.WARNING, "fasttune"):
        out = model(**batch)
    assert torch.allclose(out.loss, out.logits.sum())
    assert "replaced after fasttune.patch" in caplog.text
    fasttune.unpatch(model)
    assert torch.allclose(model(**batch).loss, out.logits.sum())


def test_labels_of_the_wrong_shape_and_out_of_range(model, batch):
    with pytest.raises(ValueError, match=r"targets: expected shape \[46\], got \[44\]"):
        model(**{**batch, "labels": batch["labels"][:, 1:]})
    bad = batch["labels"].clone()
    bad[0, 9] = 499
    with pytest.raises(ValueError, match=r"targets: expected values in \[0, 499\).* got 499"):
        model(**{**batch, "labels": bad})


def test_without_labels_or_in_eval_the_logits_are_a_tensor(model, batch):
    assert isinstance(model(input_ids=batch["input_ids"]).logits, Tensor)
    assert isinstance(model.eval()(**batch).logits, Tensor)


def test_hook_on_the_head_sees_its_call(model, batch):
    calls = []
    model.base_model.model.lm_head.register_forward_hook(lambda *a: calls.append(1))
    model(**batch).loss.backward()
    assert calls == [1]
    assert list(fasttune.report(model)["loss"].original) == ["a hook on the output head"]


@pytest.mark.parametrize(
    "change",
    [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}],
    ids=["lora-on-head", "modules-to-save"],
)
def test_adapters_on_the_head_are_exact_and_fused(batch, change):
    stock = with_lora(tiny_llama(), **change).train()
    model = fasttune.patch(with_lora(tiny_llama(), **change).train())
    expected, ours = stock(**batch).loss, model(**batch).loss
    expected.backward()
    ours.backward()
    assert relative(ours.detach(), expected.detach()) < 1e-6
    for name, gradient in gradients(stock).items():
        assert relative(gradients(model)[name], gradient) < 2e-5, name
    assert any("lm_head" in name for name in gradients(model))
    assert fasttune.report(model)["loss"].fused == 1


def test_tied_embeddings_get_both_gradients(batch):
    stock = tiny_llama(tie_word_embeddings=True).train()
    model = fasttune.patch(tiny_llama(tie_word_embeddings=True).train())
    for each in (stock, model):
        each(**batch).loss.backward()
    name = "model.embed_tokens.weight"
    assert relative(gradients(model)[name], gradients(stock)[name]) < 1e-5


def test_the_loss_holds_no_logits(batch):
    """The graph keeps the gradient of the hidden states, not [tokens, vocabulary]."""
    model = fasttune.patch(with_lora(tiny_llama(vocab_size=4001)).train())
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
    ):
        model(**batch).loss.backward()
    assert max(sizes) < 46 * 4001


@pytest.mark.parametrize("items", [None, torch.tensor(0)])
def test_a_batch_of_ignored_labels_gives_zero_gradients_as_stock(batch, items):
    labels = torch.full_like(batch["labels"], -100)
    extra = {} if items is None else {"num_items_in_batch": items}
    for each in (with_lora(tiny_llama()).train(), fasttune.patch(with_lora(tiny_llama()).train())):
        each(**{**batch, "labels": labels}, **extra).loss.backward()
        assert gradients(each)
        assert all(not bool(gradient.any()) for gradient in gradients(each).values())


def test_writes_under_no_grad_stay(model, batch):
    logits = model(**batch).logits
    with torch.no_grad():
        logits[..., 7:] = -torch.inf
        logits /= 2
    assert int(logits.argmax(-1).max()) < 7
    assert logits.materialize().requires_grad


def test_reading_with_other_adapters_than_the_forward_raises(batch):
    model = with_lora(tiny_llama(), target_modules=["q_proj", "lm_head"]).train()
    fasttune.patch(model)
    logits = model(**batch).logits
    with model.disable_adapter(), pytest.raises(RuntimeError, match="changed since"):
        logits.materialize()
    head = model.base_model.model.lm_head
    head.set_scale("default", 3.0)
    with pytest.raises(RuntimeError, match="changed since"):
        logits.materialize()


def test_reading_after_the_hidden_states_were_overwritten_raises(model, batch):
    out = model(**batch, output_hidden_states=True)
    with torch.no_grad():
        out.logits.hidden.zero_()
    with pytest.raises(RuntimeError, match="changed since"):
        out.logits.materialize()


def test_says_whether_it_needs_a_gradient(model, batch):
    assert model(**batch).logits.requires_grad
    with torch.no_grad():
        assert not model(**batch).logits.requires_grad

"""Prefix tuning of PEFT: encoded once, and under gradient checkpointing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from tiny_models import gradients, relative, tiny_llama
from torch import Tensor, nn

import fasttune
from fasttune.integrations import peft_prefix
from fasttune.testing.accounting import count

BF16 = torch.bfloat16
PROJECTED = {"prefix_projection": True, "encoder_hidden_size": 24}


def build(dtype: torch.dtype = torch.float32, base: Any = None, **changes: Any) -> Any:
    options = {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM", **PROJECTED, **changes}
    base = tiny_llama().to(dtype) if base is None else base
    torch.manual_seed(1)
    return get_peft_model(base, PrefixTuningConfig(**options)).train()


def encoder_of(model: Any) -> Any:
    return model.prompt_encoder["default"]


def step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert relative(ours[name], expected) <= tolerance, name


def fused(model: nn.Module) -> int:
    report = fasttune.report(model)["prefix"]
    assert not report.original, str(report)
    return report.fused


# ---------------------------------------------------------------------------- the encoder


def encode(encoder: Any, tokens: Tensor) -> dict[str, Tensor]:
    encoder.zero_grad()
    y = encoder(tokens)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype))
    return {"y": y.detach(), **gradients(encoder)}


def expanded() -> Tensor:
    return torch.arange(5).unsqueeze(0).expand(4, -1)


def different() -> Tensor:
    return torch.randint(0, 5, (4, 3), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("tokens", [expanded, lambda: expanded().contiguous(), different])
def test_an_encoder_is_as_near_to_the_truth_as_stock(
    dtype: torch.dtype, tokens: Callable[[], Tensor]
) -> None:
    model = build()
    encoder = encoder_of(model).to(dtype)
    exact = encode(copy.deepcopy(encoder).double(), tokens())
    stock = encode(encoder, tokens())
    fasttune.patch(model, strict=True)
    ours = encode(encoder, tokens())
    assert fused(model) == 1
    assert ours.keys() == stock.keys() and len(ours) == 6
    for name, truth in exact.items():
        assert ours[name].shape == stock[name].shape and ours[name].dtype == stock[name].dtype
        mine, theirs = ((each[name].double() - truth).abs().max() for each in (ours, stock))
        unit = torch.finfo(dtype).eps * truth.abs().max()
        assert mine <= 2 * theirs + 2 * unit, (name, float(mine), float(theirs))


@pytest.mark.parametrize("tokens", [expanded, lambda: expanded().contiguous()])
def test_the_projection_runs_on_one_sample(tokens: Callable[[], Tensor]) -> None:
    model = build()
    encoder = encoder_of(model)
    stock = count(encoder, tokens(), backward=False).forward.gemm.bytes_written
    fasttune.patch(model, strict=True)
    ours = count(encoder, tokens(), backward=False).forward.gemm.bytes_written
    assert ours == 5 * (24 + encoder.transform[2].out_features) * 4
    assert stock == 4 * ours


# ---------------------------------------------------------------------------- a model


@pytest.mark.parametrize(
    ("dtype", "options", "tolerance"),
    [
        (torch.float32, {}, 2e-5),
        (torch.float32, {"prefix_projection": False}, 2e-5),
        (BF16, {}, 5e-2),
    ],
)
def test_loss_and_gradients_equal_stock(
    dtype: torch.dtype, options: Any, tolerance: float, batch: dict[str, Tensor]
) -> None:
    stock, model = (build(dtype, **options) for _ in range(2))
    expected, before = step(stock, batch), step(model, batch)
    fasttune.patch(model, strict=True)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert_same(step(model, batch), expected, tolerance)
    assert fused(model) == 1
    fasttune.verify(model, batch)
    assert type(encoder_of(model)).__name__ == "PrefixEncoder"
    fasttune.unpatch(model)
    assert type(encoder_of(model)) is peft.PrefixEncoder
    assert type(model.get_base_model()) is type(tiny_llama())
    again = step(model, batch)
    assert all(torch.equal(again[name], value) for name, value in before.items())


def test_autocast_equals_stock(batch: dict[str, Tensor]) -> None:
    stock, model = build(), fasttune.patch(build(), kinds={"prefix"}, strict=True)
    with torch.autocast("cpu", dtype=BF16):
        expected, ours = step(stock, batch), step(model, batch)
    assert_same(ours, expected, 2e-2)
    assert fused(model) == 1


def test_eval_and_generate_are_bit_equal(batch: dict[str, Tensor]) -> None:
    stock, model = build().eval(), fasttune.patch(build(), strict=True).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "input_ids": batch["input_ids"]}
    with torch.no_grad():
        assert torch.equal(model.generate(**options), stock.generate(**options))
        assert torch.equal(model(**batch).logits, stock(**batch).logits)
    assert set(fasttune.explain(model)["prompt_encoder.default"].fallbacks) == {"inference"}


def test_deepcopy_pickle_and_saving(batch: dict[str, Tensor], tmp_path: Any) -> None:
    model = fasttune.patch(build(), strict=True)
    expected = step(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(step(other, batch), expected, 0.0)
        assert fused(other) == 1
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    with torch.no_grad():
        loaded, own = (each(**batch).logits for each in (stock, model.eval()))
    assert torch.allclose(loaded, own, atol=1e-6)


def test_one_sample_takes_peft_s_forward(batch: dict[str, Tensor]) -> None:
    one = {name: value[:1] for name, value in batch.items()}
    stock, model = build(), fasttune.patch(build(), kinds={"prefix"}, strict=True)
    expected, ours = step(stock, one), step(model, one)
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    (reason,) = fasttune.report(model)["prefix"].original
    assert "one sample" in reason


def hook_the_projection(encoder: Any) -> None:
    encoder.transform[0].register_forward_hook(lambda module, args, y: 2 * y)


def drop_in_the_projection(encoder: Any) -> None:
    encoder.transform[1] = nn.Dropout(0.5)


def scale_by_frequency(encoder: Any) -> None:
    encoder.embedding.scale_grad_by_freq = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_the_projection, "a hook on a part of the prefix encoder"),
        (drop_in_the_projection, "the projection of the prefix is not that of PEFT"),
        (scale_by_frequency, "the embedding of the prefix is not that of PEFT"),
    ],
)
def test_what_is_not_covered_takes_peft_s_forward(
    change: Callable[[Any], None], reason: str, batch: dict[str, Tensor]
) -> None:
    stock, model = build(), build()
    for each in (stock, model):
        change(encoder_of(each))
    fasttune.patch(model, kinds={"prefix"})
    results = []
    for each in (stock, model):
        torch.manual_seed(7)
        results.append(step(each, batch))
    assert all(torch.equal(results[1][name], value) for name, value in results[0].items())
    assert list(fasttune.report(model)["prefix"].original) == [reason]
    with pytest.raises(fasttune.PatchError, match=reason):
        step(fasttune.patch(model, kinds={"prefix"}, strict=True), batch)


def test_the_kind_can_be_left_out(batch: dict[str, Tensor]) -> None:
    model = fasttune.patch(build(), kinds={"norm"})
    assert type(encoder_of(model)) is peft.PrefixEncoder
    assert type(model.get_base_model()) is type(tiny_llama())


# ---------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("options", [{}, {"prefix_projection": False}])
@pytest.mark.parametrize("kinds", [None, {"prefix"}])
def test_checkpointing_equals_stock_without_it(
    options: Any, kinds: Any, batch: dict[str, Tensor]
) -> None:
    stock, model = build(**options), fasttune.patch(build(**options), kinds=kinds, strict=True)
    model.gradient_checkpointing_enable()
    runs: list[int] = []
    for index, layer in enumerate(model.get_base_model().model.layers):
        layer.self_attn.register_forward_hook(lambda *args, index=index: runs.append(index))
    expected, ours = step(stock, batch), step(model, batch)
    assert sorted(runs) == [0, 0, 1, 1]  # every layer ran again in backward
    assert_same(ours, expected, 2e-5)
    assert fused(model) == 1
    assert_same(step(model, batch), ours, 0.0)
    layers = peft_prefix.checkpointed_layers(model.get_base_model())
    assert len(layers) == 2
    assert not any("_can_checkpoint_with_cache" in layer.__dict__ for layer in layers)


def test_stock_fails_under_checkpointing(batch: dict[str, Tensor]) -> None:
    """When this passes, PEFT or transformers can do it, and half of patching/prefix.py may go."""
    model = build()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="size of tensor"):
        step(model, batch)
    base = tiny_llama()
    base.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        build(base=base)


def test_every_second_layer_checkpointed_and_verified(batch: dict[str, Tensor]) -> None:
    stock, model = build(), fasttune.patch(build(), strict=True)
    model.gradient_checkpointing_enable()
    model.get_base_model().model.layers[1].gradient_checkpointing = False
    assert_same(step(model, batch), step(stock, batch), 2e-5)
    fasttune.verify(model, batch)
    assert fused(model) == 1


def test_less_is_kept_for_backward(batch: dict[str, Tensor]) -> None:
    def kept(checkpointing: bool) -> int:
        model = fasttune.patch(build(), strict=True)
        if checkpointing:
            model.gradient_checkpointing_enable()
        return count(lambda: model(**batch).loss, backward=False).saved_bytes

    assert kept(True) < 0.5 * kept(False)


def test_copies_are_checkpointed_too(batch: dict[str, Tensor]) -> None:
    model = fasttune.patch(build(), strict=True)
    model.gradient_checkpointing_enable()
    expected = step(model, batch)
    assert_same(step(copy.deepcopy(model), batch), expected, 0.0)


def test_reentrant_checkpointing_has_a_reason(batch: dict[str, Tensor]) -> None:
    model = fasttune.patch(build())
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError):  # stock's
        step(model, batch)
    explained = fasttune.explain(model)["prompt_encoder.default"]
    assert "reentrant checkpointing loses the gradient of a cached prefix" in explained.fallbacks


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=499, pad_token_id=0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    dropouts = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=499, n_positions=64, **dropouts
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=499, pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


@pytest.mark.parametrize("base", [gemma2, gpt2, qwen3])
def test_other_families_equal_stock(
    base: Callable[[], nn.Module], batch: dict[str, Tensor]
) -> None:
    stock, model = build(base=base()), fasttune.patch(build(base=base()))
    expected = step(stock, batch)
    assert_same(step(model, batch), expected, 5e-5)
    assert fused(model) == 1
    model.gradient_checkpointing_enable()
    if base is qwen3:
        assert_same(step(model, batch), expected, 5e-5)
        return
    with pytest.raises(RuntimeError, match="size of"):  # stock's
        step(model, batch)
    if base is gemma2:
        reasons = fasttune.explain(model)["prompt_encoder.default"].fallbacks
        assert list(reasons) == ["the prefix is cached in DynamicSlidingWindowLayer"]


def test_a_model_that_ignores_the_prefix_is_an_error(
    batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where attention gets no mask, and the missing prefix would not be noticed."""
    model = fasttune.patch(build(), strict=True)
    model.gradient_checkpointing_enable()
    base = model.get_base_model().model
    forward = type(base).forward

    def without_cache(self: Any, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("past_key_values", None)
        kwargs["attention_mask"] = None
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(base), "forward", without_cache)
    with pytest.raises(fasttune.PatchError, match=r"ignores the prefix of its layers \[0, 1\]"):
        step(model, batch)


def test_a_cache_without_gradient_is_left_alone(batch: dict[str, Tensor]) -> None:
    """Only a prefix that trains is handed through; other caches are transformers' business."""
    model = fasttune.patch(build(), strict=True).get_base_model().requires_grad_(True)
    model.gradient_checkpointing_enable()
    tokens = batch["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=tokens[:, :4], use_cache=True).cache
    with pytest.raises(RuntimeError, match="size of the tensor"):
        model(input_ids=tokens[:, 4:], cache=cache, labels=tokens[:, 4:])

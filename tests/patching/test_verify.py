"""verify catches what it promises to catch, and leaves no trace; compare measures."""

from __future__ import annotations

import importlib

import pytest
import torch

import fasttune
from fasttune import _native
from fasttune.patching import loss as loss_module


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request, make_lora_model):
    return fasttune.patch(make_lora_model(request.param, lora_dropout=0.1))


def test_a_patched_model_verifies(model, batch):
    result = fasttune.verify(model, batch)
    assert {check.tensor for check in result.layers} >= {
        "output",
        "input gradient",
        "gradient of lora_A[0]",
    }
    # 14 projections with LoRA and 4 of the 5 norms: the first one's input needs no gradient.
    assert len({check.layer for check in result.layers}) == 18
    assert len(result.step) == 29
    assert all(check.error <= check.allowed for check in (*result.layers, *result.step))
    assert "passed" in str(result)


@pytest.mark.parametrize(
    ("primitive", "part"),
    [
        ("lora_down", None),
        ("lora_up_backward", 1),
        ("lora_down_backward", 0),
        ("lora_down_backward", 1),
    ],
)
def test_a_wrong_kernel_is_named(model, batch, monkeypatch, primitive, part):
    original = getattr(_native, primitive)

    def wrong(*args, **kwargs):
        result = original(*args, **kwargs)
        if part is None:
            return result * 1.05
        if result[part] is not None:
            result[part].mul_(1.05)
        return result

    monkeypatch.setattr(_native, primitive, wrong)
    with pytest.raises(fasttune.VerificationError) as caught:
        fasttune.verify(model, batch)
    assert "layers" in caught.value.layer
    assert caught.value.error > caught.value.allowed


def test_zero_gradients_are_caught(model, batch, monkeypatch):
    original = _native.lora_up_backward

    def zero(*args, **kwargs):
        d, db = original(*args, **kwargs)
        return d, None if db is None else db.zero_()

    monkeypatch.setattr(_native, "lora_up_backward", zero)
    module = importlib.import_module("fasttune.patching.verify")
    monkeypatch.setattr(module, "check_layers", lambda *a: [])
    with pytest.raises(
        fasttune.VerificationError, match=r"lora_B.* \(zero or missing, stock's is not\)"
    ):
        fasttune.verify(model, batch)


def test_a_wrong_loss_is_caught(model, batch, monkeypatch):
    original = loss_module.apply_head
    monkeypatch.setattr(loss_module, "apply_head", lambda *a: tuple(1.1 * s for s in original(*a)))
    with pytest.raises(fasttune.VerificationError, match="loss deviates"):
        fasttune.verify(model, batch)


def test_verify_leaves_no_trace(model, batch):
    model(**batch).loss.backward()
    model.eval()
    model.base_model.model.lm_head.train()
    modes = [module.training for module in model.modules()]
    grads = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
    explained = str(fasttune.explain(model))
    values = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    fasttune.verify(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name])
        if name in grads:
            assert parameter.grad is grads[name][0]
            assert torch.equal(parameter.grad, grads[name][1])
        else:
            assert parameter.grad is None
    assert str(fasttune.explain(model)) == explained
    assert not any(module._forward_hooks for module in model.modules())


def test_verify_with_a_loss_function_and_wrong_input(model, batch):
    def loss_fn(module, data):
        return module(**data).loss * 2

    assert fasttune.verify(model, batch, loss_fn).step
    with pytest.raises(TypeError, match="batch: expected a mapping"):
        fasttune.verify(model, [1, 2])
    with pytest.raises(ValueError, match="labels"):
        fasttune.verify(model, {"input_ids": batch["input_ids"]})
    with pytest.raises(fasttune.PatchError, match="not patched"):
        fasttune.verify(fasttune.unpatch(model), batch)


def test_verify_of_a_strict_model(make_lora_model, batch):
    model = fasttune.patch(make_lora_model(target_modules=["q_proj", "lm_head"]), strict=True)
    assert fasttune.verify(model, batch).step


def test_compare(model, batch):
    result = fasttune.compare(model, batch, pairs=2)
    assert result.stock_ms > 0 and result.fasttune_ms > 0 and result.pairs == 2
    assert "fasttune / stock" in str(result)
    assert fasttune.is_patched(model)
    with pytest.raises(ValueError, match="pairs: expected at least 1, got 0"):
        fasttune.compare(model, batch, pairs=0)


def test_a_batch_without_a_finite_loss_is_refused(model, batch):
    labels = torch.full_like(batch["labels"], -100)
    with pytest.raises(ValueError, match="stock loss is nan"):
        fasttune.verify(model, {**batch, "labels": labels})


def test_verify_under_no_grad_and_without_anything_to_train(model, batch):
    with torch.no_grad():
        assert fasttune.verify(model, batch).step
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="needs no gradient"):
        fasttune.verify(model, batch)


@pytest.mark.limits
def test_a_small_batch_is_checked_on_the_fused_path(make_lora_model, batch):
    """Its calls take the original path in training, and a check of that would say nothing."""
    model = fasttune.patch(make_lora_model())
    verified = fasttune.verify(model, batch)
    assert {check.layer for check in verified.layers if "q_proj" in check.layer}
    model(**batch).loss.backward()
    assert fasttune.report(model)["lora"].fused == 0  # the limits are back

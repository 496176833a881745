"""patch and unpatch: equal results, reversible, incremental, and clear when nothing fits."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
from tiny_models import gradients, relative, tiny_llama, with_lora
from torch import nn

import fasttune
from fasttune import _registry
from fasttune.patching import lora, swap


def step(model, batch):
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "lm_head"]])
def test_loss_and_gradients_equal_stock(make_lora_model, batch, target):
    stock_loss, stock = step(make_lora_model(target_modules=target), batch)
    loss, ours = step(fasttune.patch(make_lora_model(target_modules=target)), batch)
    assert relative(loss, stock_loss) < 1e-6
    assert ours.keys() == stock.keys()
    assert max(relative(ours[name], stock[name]) for name in stock) < 2e-5


def test_bf16_is_as_near_to_fp32_as_stock(make_lora_model, batch):
    _, truth = step(make_lora_model(torch.float32), batch)
    _, stock = step(make_lora_model(torch.bfloat16), batch)
    _, ours = step(fasttune.patch(make_lora_model(torch.bfloat16)), batch)
    # The truth has fp32 weights, so both carry the rounding of the weights; ours must not be worse.
    assert sum(relative(ours[n], truth[n]) for n in truth) < 1.05 * sum(
        relative(stock[n], truth[n]) for n in truth
    )


def test_every_lora_layer_and_the_loss_are_fused(make_lora_model, batch):
    model = fasttune.patch(make_lora_model())
    assert fasttune.report(model)["lora"].pending == 14
    step(model, batch)
    report = fasttune.report(model)
    assert (report["lora"].fused, report["lora"].original) == (14, {})
    assert (report["loss"].fused, report["loss"].original) == (1, {})
    assert "LoRA layers" in str(report)


def test_unpatch_restores_types_and_bits(make_lora_model, batch):
    reference = make_lora_model().eval()
    model = make_lora_model().eval()
    types = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    expected = reference(**batch).logits
    fasttune.patch(model)
    assert list(model.state_dict()) == keys
    fasttune.unpatch(model)
    assert [type(module) for module in model.modules()] == types
    assert torch.equal(model(**batch).logits, expected)
    assert not any("fasttune" in key for module in model.modules() for key in module.__dict__)
    assert "_loss_function" not in model.base_model.model.__dict__


def test_patched_twice_is_the_same(make_lora_model, batch):
    once = step(fasttune.patch(make_lora_model()), batch)
    twice = step(fasttune.patch(fasttune.patch(make_lora_model())), batch)
    assert torch.equal(once[0], twice[0])
    model = fasttune.patch(fasttune.patch(make_lora_model()))
    assert all(len(swap.kinds_of(module)) <= 2 for module in model.modules())
    fasttune.unpatch(model)
    assert not fasttune.is_patched(model)


def test_class_names_survive(make_lora_model):
    model = fasttune.patch(make_lora_model())
    inner = model.base_model.model
    assert type(inner).__name__ == "LlamaForCausalLM"
    layer = inner.model.layers[0].self_attn.q_proj
    assert type(layer).__qualname__ == "Linear"
    assert isinstance(layer, swap.original_class(layer))


def test_signature_of_forward_survives(make_lora_model):
    import inspect

    stock = inspect.signature(make_lora_model().base_model.model.forward)
    assert inspect.signature(fasttune.patch(make_lora_model()).base_model.model.forward) == stock


def test_deepcopy_has_its_own_weights(make_lora_model, batch):
    model = fasttune.patch(make_lora_model())
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(clone(**batch).loss, model(**batch).loss)
    loss, _ = step(model, batch)
    assert gradients(clone) == {}
    fresh, _ = step(fasttune.patch(make_lora_model()), batch)
    assert torch.equal(loss, fresh)


def test_pickle_round_trip_stays_patched(make_lora_model, batch):
    model = fasttune.patch(make_lora_model())
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(**batch).loss, model(**batch).loss)
    assert fasttune.is_patched(copied)
    buffer = io.BytesIO()
    torch.save(fasttune.unpatch(copied), buffer)
    buffer.seek(0)
    assert not fasttune.is_patched(torch.load(buffer, weights_only=False))


def test_lora_added_after_patch_warns_and_a_second_patch_fuses_it(batch, caplog):
    model = fasttune.patch(tiny_llama().train())
    wrapped = with_lora(model).train()
    with caplog.at_level(logging.WARNING, "fasttune"):
        wrapped(**batch)
    assert "14 LoRA layers were added after fasttune.patch" in caplog.text
    fasttune.patch(wrapped)
    wrapped(**batch).loss.backward()
    assert fasttune.report(wrapped)["lora"].fused == 14


def test_include_exclude_and_kinds(make_lora_model, batch):
    model = fasttune.patch(make_lora_model(), include=["q_proj"], kinds={"lora"})
    step(model, batch)
    report = fasttune.report(model)
    assert report["lora"].fused == 2
    assert report["lora"].original == {"left out by include / exclude": 12}
    assert report["loss"].fused == 0
    model = fasttune.patch(make_lora_model(), exclude="q_proj", fused_loss=False)
    step(model, batch)
    assert fasttune.report(model)["lora"].fused == 12
    assert isinstance(model(**batch).logits, torch.Tensor)


def test_a_narrower_patch_takes_back_what_falls_outside(make_lora_model, batch):
    model = fasttune.patch(make_lora_model())
    fasttune.patch(model, fused_loss=False)
    assert isinstance(model(**batch).logits, torch.Tensor)
    fasttune.patch(model, exclude="q_proj")
    step(model, batch)
    assert fasttune.report(model)["lora"].fused == 12
    fasttune.patch(model, kinds={"lora"})
    assert fasttune.report(model)["loss"].fused == 0


def test_names_that_match_nothing_are_named(make_lora_model, caplog):
    with caplog.at_level(logging.WARNING, "fasttune"):
        fasttune.patch(make_lora_model(), exclude="q_projj")
    assert "exclude: no module is named 'q_projj'" in caplog.text


def test_a_misspelt_backend_shows_at_patch(make_lora_model, monkeypatch):
    monkeypatch.setattr(_registry, "forced_by_environment", None)  # and put back afterwards
    monkeypatch.setenv("FASTTUNE_BACKEND", "bogus")
    with pytest.raises(ValueError, match="FASTTUNE_BACKEND"):
        fasttune.patch(make_lora_model())


def test_no_module(make_lora_model):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        fasttune.patch({})
    with pytest.raises(TypeError, match="model"):
        fasttune.unpatch(3)


def test_unknown_kind(make_lora_model):
    with pytest.raises(ValueError, match=r"kinds: expected a subset of .* got \['lorra'\]"):
        fasttune.patch(make_lora_model(), kinds={"lorra"})


def test_nothing_to_patch_warns_and_strict_raises(caplog):
    plain = nn.Sequential(nn.Linear(3, 3))
    with caplog.at_level(logging.WARNING, "fasttune"):
        assert fasttune.patch(plain) is plain
    assert "found nothing to fuse in Sequential" in caplog.text
    with pytest.raises(fasttune.PatchError, match="nothing to fuse"):
        fasttune.patch(plain, strict=True)


def test_unpatch_of_an_unpatched_model_is_a_warned_no_op(make_lora_model, caplog):
    model = make_lora_model()
    with caplog.at_level(logging.WARNING, "fasttune"):
        assert fasttune.unpatch(model) is model
    assert "not patched" in caplog.text


def test_disabled_by_the_environment(make_lora_model, monkeypatch, caplog):
    monkeypatch.setenv("FASTTUNE_DISABLE", "1")
    with caplog.at_level(logging.WARNING, "fasttune"):
        assert not fasttune.is_patched(fasttune.patch(make_lora_model()))
    assert "FASTTUNE_DISABLE" in caplog.text


def test_an_exception_in_the_middle_reverts_all(make_lora_model, monkeypatch):
    model = make_lora_model()
    types = [type(module) for module in model.modules()]
    calls = []
    original = swap.swap

    def fails_at_the_tenth(module, kind):
        calls.append(kind)
        if len(calls) == 10:
            raise RuntimeError("planted")
        original(module, kind)

    monkeypatch.setattr(swap, "swap", fails_at_the_tenth)
    with pytest.raises(RuntimeError, match="planted"):
        fasttune.patch(model)
    assert [type(module) for module in model.modules()] == types
    assert not any("fasttune" in key for module in model.modules() for key in module.__dict__)


def test_a_sharded_model_is_refused(make_lora_model, tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = make_lora_model()
        fully_shard(model, mesh=mesh)
        with pytest.raises(fasttune.PatchError, match="before sharding"):
            fasttune.patch(model)
        patched = fasttune.patch(make_lora_model())
        fully_shard(patched.base_model.model.model.layers[0].self_attn.q_proj, mesh=mesh)
        with pytest.raises(fasttune.PatchError, match="another library swapped the class"):
            fasttune.unpatch(patched)
        assert lora.KIND in swap.kinds_of(patched.base_model.model.model.layers[1].mlp.up_proj)
    finally:
        dist.destroy_process_group()


def test_modules_take_their_input_by_name(make_lora_model):
    """As their own forward does, whatever it calls its first argument."""
    model = fasttune.patch(make_lora_model()).train()
    block = model.base_model.model.model.layers[0]
    x = torch.randn(2, 5, block.hidden_size)
    for module, name in (
        (block.input_layernorm, "hidden_states"),
        (block.mlp, "x"),
        (block.self_attn.q_proj, "x"),
    ):
        assert torch.equal(module(**{name: x}), module(x))
    assert not fasttune.report(model)["norm"].original

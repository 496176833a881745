"""What a mixed batch refuses, each in one line; and PEFT's own adapter_names."""

from __future__ import annotations

import pytest
import torch
from mixed_batches import ADAPTERS, NAMES, inputs, mixed_run, q_proj
from tiny_models import gradients, relative
from torch import nn

import fasttune


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["de", "xx"], ValueError, "names: no adapter 'xx' in the model; it has .*'de', 'default'"),
        ("de", TypeError, "names: expected a sequence of adapter names, got str"),
        ([1], TypeError, "names: expected strings, got int"),
        (["default"], ValueError, "names: no parameter of adapter 'default' requires a gradient"),
    ],
    ids=str,
)
def test_wrong_names_are_named(make_model, names, error, message):
    model = fasttune.patch(make_model())
    with pytest.raises(error, match=message), fasttune.mixed_adapters(model, names):
        pass


def test_frozen_adapters_may_be_named(make_model):
    model = fasttune.patch(make_model())
    with fasttune.mixed_adapters(model, ["default", "de"], frozen=["default"]):
        model(**inputs(2)).logits.sum().backward()
    assert all(".de." in name for name in gradients(model))
    with torch.no_grad(), fasttune.mixed_adapters(model, ["default"]):
        pass


def test_a_batch_of_another_size_raises_at_the_first_forward(make_model):
    model = fasttune.patch(make_model())
    message = r"names: expected one per sample, got 2 for the 3 samples of .*layers\.0"
    with fasttune.mixed_adapters(model, ["de", "fr"]), pytest.raises(ValueError, match=message):
        model(**inputs(3))


def test_unpatched_and_merged_models(make_model):
    model = make_model()
    with (
        pytest.raises(fasttune.PatchError, match="model: no patched LoRA layer; call fasttune"),
        fasttune.mixed_adapters(model, NAMES),
    ):
        pass
    fasttune.patch(model)
    with fasttune.mixed_adapters(model, NAMES):
        model.merge_adapter()
        with pytest.raises(fasttune.PatchError, match="adapters are merged"):
            model(**inputs())
    with (
        pytest.raises(fasttune.PatchError, match=r"q_proj .* call unmerge_adapter first"),
        fasttune.mixed_adapters(model, NAMES),
    ):
        pass
    model.unmerge_adapter()
    mixed_run(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"use_dora": True},
            "q_proj cannot run a mixed batch: adapter 'de': LoRA variant DoraLinearVariant",
        ),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "embed_tokens cannot run a mixed batch: LoRA on Embedding has one adapter",
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            "lm_head cannot run a mixed batch: modules_to_save .* of adapter 'de'",
        ),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
            "embed_tokens cannot run a mixed batch: .* trainable tokens of adapter 'de'",
        ),
    ],
    ids=str,
)
def test_layers_that_cannot_be_mixed_are_named(make_model, change, message):
    model = fasttune.patch(make_model(adapters={"de": (4, ["q_proj"])}, **change))
    with (
        pytest.raises(fasttune.PatchError, match=message),
        fasttune.mixed_adapters(model, ["de", "__base__"]),
    ):
        pass


def test_layers_left_out_by_patch_are_named(make_model):
    model = fasttune.patch(make_model(), exclude=["k_proj"])
    with (
        pytest.raises(fasttune.PatchError, match=r"k_proj cannot .* fasttune.patch left it out"),
        fasttune.mixed_adapters(model, NAMES),
    ):
        pass


def test_a_hook_inside_a_layer_raises_instead_of_being_skipped(make_model):
    model = fasttune.patch(make_model())
    q_proj(model).lora_A["de"].register_forward_hook(lambda *a: None)
    with (
        pytest.raises(fasttune.PatchError, match=r"q_proj .* a hook on lora_A\['de'\]"),
        fasttune.mixed_adapters(model, NAMES),
    ):
        pass
    with fasttune.mixed_adapters(model, ["fr", "__base__"]):
        model(**inputs(2))


def test_a_data_parallel_replica_raises_instead_of_running_the_active_adapter(make_model):
    model = fasttune.patch(make_model())
    replica, x = q_proj(model)._replicate_for_data_parallel(), torch.randn(5, 3, 64)
    with (
        fasttune.mixed_adapters(model, NAMES),
        pytest.raises(fasttune.PatchError, match=r"q_proj: a DataParallel replica"),
    ):
        replica(x)


def test_quantised_base_layers_are_named(make_model):
    model = fasttune.patch(make_model())
    layer = q_proj(model)
    layer.base_layer.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), False)
    with (
        fasttune.mixed_adapters(model, NAMES),
        pytest.raises(
            fasttune.PatchError,
            match="q_proj: no mixed batch: its base layer",
        ),
    ):
        model(**inputs())


def test_torch_compile_raises(make_model):
    model = fasttune.patch(make_model())
    layer, x = q_proj(model), torch.randn(5, 3, 64)
    torch._dynamo.reset()
    compiled = torch.compile(layer.forward, backend="eager", fullgraph=True)
    plain = compiled(x)
    with fasttune.mixed_adapters(model, NAMES), pytest.raises(Exception, match="mixed batch"):
        compiled(x)
    assert torch.equal(compiled(x), plain)
    whole = torch.compile(model, backend="eager")
    with (
        pytest.raises(fasttune.PatchError, match="a compiled model cannot run mixed batches"),
        fasttune.mixed_adapters(whole, NAMES),
    ):
        pass


def test_adapter_names_of_peft_equal_stock(make_model):
    stock, model = make_model().eval(), fasttune.patch(make_model()).eval()
    with torch.no_grad():
        expected = stock(**inputs(), adapter_names=NAMES).logits
        logits = model(**inputs(), adapter_names=NAMES).logits
    assert relative(logits, expected) < 1e-6
    layers = [layer for layer in fasttune.explain(model).layers if layer.kind == "lora"]
    assert all(layer.path == "fused" for layer in layers)


def test_adapter_names_of_peft_in_generate(make_model):
    stock, model = make_model().eval(), fasttune.patch(make_model()).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "adapter_names": NAMES}
    assert torch.equal(model.generate(**inputs(), **options), stock.generate(**inputs(), **options))


def test_adapter_names_errors_are_those_of_stock(make_model):
    for train, merge, names, dora in (
        (True, False, NAMES, False),
        (False, True, NAMES, False),
        (False, False, NAMES[:2], False),
        (False, False, ["xx"] * 5, False),
        (False, False, ["de"] * 5, True),
    ):
        messages = []
        for patched in (False, True):
            model = make_model(adapters={"de": (4, "all-linear"), **ADAPTERS}, use_dora=dora)
            model = (fasttune.patch(model) if patched else model).train(train)
            if merge:
                model.merge_adapter()
            with pytest.raises(ValueError) as error, torch.no_grad():
                model(**inputs(), adapter_names=names)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@pytest.mark.limits
def test_adapter_names_of_small_inputs_take_peft_s_own_path(make_model):
    stock, model = make_model().eval(), fasttune.patch(make_model()).eval()
    with torch.no_grad():
        logits = model(**inputs(), adapter_names=NAMES).logits
        assert torch.equal(logits, stock(**inputs(), adapter_names=NAMES).logits)
    reasons = fasttune.report(model)["lora"].original
    assert list(reasons) == ["the original forward is as fast for an input this small"]

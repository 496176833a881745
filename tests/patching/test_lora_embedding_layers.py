"""PEFT's LoRA on embeddings, fused by class swap: stock against patched."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import gradients, relative, tiny_llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fasttune
from fasttune.testing import numerics

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
VOCABULARY, FEATURES = 61, 24
IDS = torch.tensor([[3, 60, 3, 3, 0, 17, 9], [9, 4, 0, 5, 3, 1, 2]])


def away_from_zero(model: nn.Module) -> Any:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.train()


def llama(tied: bool = False, **changes: Any) -> Any:
    options = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], **changes}
    base = tiny_llama(tie_word_embeddings=tied)
    return away_from_zero(get_peft_model(base, LoraConfig(**options)))


def one_layer(base: nn.Module | None = None, **changes: Any) -> Any:
    embedding: Any = nn.Embedding(VOCABULARY, FEATURES) if base is None else base
    torch.manual_seed(4)
    nn.init.normal_(embedding.weight)
    config = LoraConfig(**{"r": 5, "lora_alpha": 7, "target_modules": ["0"], **changes})
    return away_from_zero(get_peft_model(nn.Sequential(embedding), config))


def layer_of(model: Any) -> Any:
    return model.base_model.model[0]


def step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def layer_step(
    model: nn.Module, ids: Tensor = IDS, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=autocast or BF16, enabled=autocast is not None):
        y = model(ids)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(BF16)
    if y.requires_grad:
        y.backward(dy.to(y.dtype))
    return {"y": y.detach(), **gradients(model)}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert relative(ours[name], expected) <= tolerance, name


def paths(model: nn.Module) -> tuple[int, list[str]]:
    report = fasttune.report(model)["lora"]
    return report.fused, sorted(report.original)


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_of_a_model_equal_stock(batch: dict[str, Tensor], tied: bool) -> None:
    stock, model = llama(tied), fasttune.patch(llama(tied))
    assert list(model.state_dict()) == list(stock.state_dict())
    expected, ours = step(stock, batch), step(model, batch)
    assert any("lora_embedding_A" in name for name in ours)
    assert_same(ours, expected, 2e-5)
    assert paths(model) == (3, [])
    layer = fasttune.explain(model)["embed_tokens"]
    assert layer.path == "fused" and layer.backend == "cpu" and layer.saved_bytes > 0
    fasttune.unpatch(model)
    again = step(model, batch)
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_adapters_of_a_tied_head_share_their_factors(batch: dict[str, Tensor]) -> None:
    """PEFT's ensure_weight_tying: the head's A and B are transposed views of the embedding's."""
    options = {"tied": True, "ensure_weight_tying": True}
    stock, model = llama(**options), fasttune.patch(llama(**options))
    assert_same(step(model, batch), step(stock, batch), 2e-5)
    assert paths(model) == (4, [])


@pytest.mark.parametrize(
    ("base", "adapter", "autocast"),
    [
        (FP32, FP32, None),
        (BF16, FP32, None),
        (BF16, BF16, None),
        (FP16, FP32, None),
        (FP32, BF16, None),
        (FP32, FP32, BF16),
        (BF16, FP32, BF16),
    ],
)
def test_a_layer_is_as_near_to_the_truth_as_stock(
    base: torch.dtype, adapter: torch.dtype, autocast: torch.dtype | None
) -> None:
    def made() -> Any:
        model = one_layer(nn.Embedding(VOCABULARY, FEATURES, dtype=base))
        layer = layer_of(model)
        layer.lora_embedding_A.to(adapter)
        layer.lora_embedding_B.to(adapter)
        return model

    stock, model = made(), fasttune.patch(made(), strict=True)
    truth = layer_step(copy.deepcopy(stock).double())
    theirs, ours = layer_step(stock, autocast=autocast), layer_step(model, autocast=autocast)
    assert ours.keys() == theirs.keys() and len(ours) == 3
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        numerics.check(name, ours[name], expected, truth[name])
    assert paths(model) == (1, [])


def second_adapter(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=9, target_modules=["0"]))
    away_from_zero(model)


def both_active(model: Any) -> None:
    second_adapter(model)
    model.base_model.set_adapter(["default", "second"])


def the_second_active(model: Any) -> None:
    second_adapter(model)
    model.set_adapter("second")


def weighted(model: Any) -> None:
    second_adapter(model)
    model.add_weighted_adapter(["default", "second"], [0.7, 0.4], "sum", combination_type="cat")
    model.set_adapter("sum")


def merged_and_unmerged(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def frozen_a(model: Any) -> None:
    layer_of(model).lora_embedding_A["default"].requires_grad_(False)


def frozen_b(model: Any) -> None:
    layer_of(model).lora_embedding_B["default"].requires_grad_(False)


def trained_base(model: Any) -> None:
    layer_of(model).base_layer.weight.requires_grad_(True)


def scaled(model: Any) -> None:
    layer_of(model).scale_layer(0.3)


def tensor_scaling(model: Any) -> None:
    layer_of(model).scaling["default"] = torch.tensor(0.8)


def strided_factors(model: Any) -> None:
    for factors in (layer_of(model).lora_embedding_A, layer_of(model).lora_embedding_B):
        factors["default"].data = factors["default"].data.t().contiguous().t()


def in_half(model: Any) -> None:
    model.to(BF16).to(FP32)


def hooked_base(model: Any) -> None:
    """What ``enable_input_require_grads`` does."""
    layer_of(model).base_layer.register_forward_hook(
        lambda module, args, y: (2.0 * y).requires_grad_()
    )


ACTIONS: list[Callable[[Any], None]] = [
    both_active, the_second_active, weighted, merged_and_unmerged, frozen_a, frozen_b,
    trained_base, scaled, tensor_scaling, strided_factors, in_half, hooked_base,
]  # fmt: skip


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_an_action_after_patch(action: Callable[[Any], None]) -> None:
    stock, model = one_layer(), fasttune.patch(one_layer(), strict=True)
    for each in (stock, model):
        action(each)
    assert_same(layer_step(model), layer_step(stock), 2e-6)
    assert paths(model) == (1, [])


def test_everything_frozen_needs_no_backward() -> None:
    model = fasttune.patch(one_layer(), strict=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    stock = one_layer()
    assert torch.allclose(layer_step(model)["y"], layer_step(stock)["y"], rtol=1e-6, atol=1e-6)
    assert paths(model) == (1, [])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_scale_inside_the_embedding(dtype: torch.dtype) -> None:
    """Gemma multiplies what it looks up, and PEFT the branch with it."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    def made() -> Any:
        embedding = Gemma3TextScaledWordEmbedding(VOCABULARY, FEATURES, 0, embed_scale=4.9)
        return one_layer(embedding.to(dtype))

    stock, model = made(), fasttune.patch(made(), strict=True)
    truth = layer_step(copy.deepcopy(stock).double())
    theirs, ours = layer_step(stock), layer_step(model)
    for name, expected in theirs.items():
        numerics.check(name, ours[name], expected, truth[name])
    assert paths(model) == (1, [])
    (a,) = (value for name, value in ours.items() if "lora_embedding_A" in name)
    assert not a[:, 0].any() and a[:, 3].any()  # the padding token trains nothing in A


def test_input_shapes() -> None:
    stock, model = one_layer(), fasttune.patch(one_layer(), strict=True)
    inputs = [IDS[0], IDS[:, :0], IDS[0, 0], IDS.t(), IDS.int(), IDS[None, :, ::2]]
    for ids in inputs:
        assert_same(layer_step(model, ids), layer_step(stock, ids), 2e-6)
    assert fasttune.explain(model)["0"].fused_calls == len(inputs)


def test_errors_are_those_of_stock() -> None:
    stock, model = one_layer(), fasttune.patch(one_layer())
    for ids in (torch.tensor([VOCABULARY]), torch.tensor([1.0]), "text"):
        errors = []
        for each in (stock, model):
            with pytest.raises(Exception) as caught:
                each(ids)
            errors.append(caught.value)
        assert type(errors[0]) is type(errors[1]) and str(errors[0]) == str(errors[1])


# ---------------------------------------------------------------------------- the original path


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def merged(model: Any) -> None:
    model.merge_adapter()


def max_norm(model: Any) -> None:
    layer_of(model).base_layer.max_norm = 1.0


def scaled_by_frequency(model: Any) -> None:
    layer_of(model).base_layer.scale_grad_by_freq = True


def adapters_of_two_dtypes(model: Any) -> None:
    both_active(model)
    layer_of(model).lora_embedding_A["second"].data = (
        layer_of(model).lora_embedding_A["second"].data.half()
    )
    layer_of(model).lora_embedding_B["second"].data = (
        layer_of(model).lora_embedding_B["second"].data.half()
    )


def another_active(model: Any) -> None:
    layer_of(model)._active_adapter = ["elsewhere"]


def factor_of_one_row(model: Any) -> None:
    factors = layer_of(model).lora_embedding_B
    factors["default"] = nn.Parameter(factors["default"].detach()[:1].clone())


NOT_FUSED: dict[Callable[[Any], None], str] = {
    disabled: "adapters are disabled",
    merged: "adapters are merged",
    max_norm: "its embedding has max_norm",
    scaled_by_frequency: "its embedding has max_norm, scale_grad_by_freq",
    adapters_of_two_dtypes: "active adapters differ in dtype",
    factor_of_one_row: "do not fit",
    another_active: "no active adapter on this layer",
}


@pytest.mark.parametrize("action", NOT_FUSED, ids=lambda action: action.__name__)
def test_what_is_not_covered_takes_peft_s_forward(action: Callable[[Any], None]) -> None:
    stock, model = one_layer(), fasttune.patch(one_layer())
    for each in (stock, model):
        action(each)
    theirs, ours = layer_step(stock), layer_step(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    fused, (reason,) = paths(model)
    assert fused == 0 and NOT_FUSED[action] in reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "LoRA variant DoraEmbeddingVariant"),
        ({"init_lora_weights": "mica"}, "LoRA variant MiCAEmbeddingVariant"),
    ],
    ids=["dora", "mica"],
)
def test_variants_are_named_and_left_alone(changes: dict[str, Any], reason: str) -> None:
    stock, model = one_layer(**changes), fasttune.patch(one_layer(**changes))
    theirs, ours = layer_step(stock), layer_step(model)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert paths(model) == (0, [reason])


def test_a_variant_that_is_added_after_patch() -> None:
    stock, model = one_layer(), fasttune.patch(one_layer())
    for each in (stock, model):
        config = LoraConfig(r=3, target_modules=["0"], use_dora=True)
        each.add_adapter("second", config)
        away_from_zero(each).set_adapter("second")
    theirs, ours = layer_step(stock), layer_step(model)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert paths(model) == (0, ["LoRA variant DoraEmbeddingVariant"])


def test_eval_and_adapter_names_are_bit_equal() -> None:
    stock, model = one_layer(), fasttune.patch(one_layer())
    for each in (stock, model):
        second_adapter(each)
        each.eval()
    names = ["second", "__base__"]
    with torch.no_grad():
        assert torch.equal(model(IDS), stock(IDS))
    assert torch.equal(model(IDS, adapter_names=names), stock(IDS, adapter_names=names))
    _, reasons = paths(model)
    assert reasons == ["called with extra arguments"]
    assert "inference" in fasttune.explain(model)["0"].fallbacks


def test_a_mixed_batch_is_refused() -> None:
    model = fasttune.patch(one_layer())
    with (
        pytest.raises(fasttune.PatchError, match="LoRA on Embedding has one adapter for all"),
        fasttune.mixed_adapters(model, ["default", "__base__"]),
    ):
        pass


@pytest.mark.limits
def test_a_small_input_is_left_to_peft() -> None:
    model = fasttune.patch(one_layer())
    layer_step(model)
    assert paths(model) == (0, ["the original forward is as fast for an input this small"])


def test_torch_compile_traces_peft_s_forward() -> None:
    stock, model = one_layer(), fasttune.patch(one_layer())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(IDS), stock(IDS))
    assert fasttune.explain(model)["0"].fused_calls == 0


# ---------------------------------------------------------------------------- life of a model


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(batch: dict[str, Tensor], reentrant: bool) -> None:
    stock, model = llama(), fasttune.patch(llama())
    for each in (stock, model):
        each.enable_input_require_grads()
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(step(model, batch), step(stock, batch), 2e-5)
    inside = one_layer()
    y = checkpoint(fasttune.patch(inside, strict=True), IDS, use_reentrant=False)
    y.square().sum().backward()
    other = one_layer()
    other(IDS).square().sum().backward()
    assert_same(gradients(inside), gradients(other), 2e-6)


def test_copies_stay_patched_and_have_their_own_weights(tmp_path: Path) -> None:
    model = fasttune.patch(one_layer(), strict=True)
    before = layer_step(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            layer_of(twin).lora_embedding_A["default"].mul_(2)
        assert_same(layer_step(model), before, 0.0)
        assert relative(layer_step(twin)["y"], before["y"]) > 1e-3
        assert fasttune.report(twin)["lora"].fused == 1
    model.save_pretrained(tmp_path)
    base = nn.Sequential(nn.Embedding(VOCABULARY, FEATURES))
    base[0].load_state_dict(layer_of(model).base_layer.state_dict())
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    assert_same(layer_step(loaded), before, 2e-6)


def test_verify_replays_the_embedding_and_sees_a_wrong_one(
    batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fasttune.patch(llama())
    checked = fasttune.verify(model, batch)
    embedding = [check.tensor for check in checked.layers if check.layer.endswith("embed_tokens")]
    assert embedding == [
        "output", "input gradient", "gradient of lora_embedding_A[0]",
        "gradient of lora_embedding_B[0]",
    ]  # fmt: skip
    op = sys.modules["fasttune.ops.lora_embedding"]  # the package's attribute is the function
    original = op._column_sums

    def wrong(*args: Any) -> Tensor:
        da: Tensor = original(*args) * 1.01
        return da

    monkeypatch.setattr(op, "_column_sums", wrong)
    with pytest.raises(fasttune.VerificationError, match=r"embed_tokens.*lora_embedding_A\[0\]"):
        fasttune.verify(model, batch)

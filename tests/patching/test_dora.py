"""DoRA layers, stock against patched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import gradients, relative, tiny_llama, with_lora
from torch import Tensor, nn

import fasttune
from fasttune import _native
from fasttune.ops import dora_linear, dora_weight_norm
from fasttune.ops._dora_linear_backends import _product_in_fp32
from fasttune.testing import accounting

TOLERANCE = 2e-5  # as in test_lora_layers


def build(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = with_lora(tiny_llama().to(dtype), use_dora=True, **changes)
    torch.manual_seed(6)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            with torch.no_grad():
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    return model.train()


def step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def assert_same(
    model: nn.Module, stock: nn.Module, batch: dict[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    ours, expected = step(model, batch), step(stock, batch)
    assert ours.keys() == expected.keys()
    assert sum("magnitude" in name for name in ours) in (0, 14)
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype, name
        assert relative(ours[name], value) <= tolerance, name


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"rank_pattern": {"q_proj": 7}}],
    ids=str,
)
def test_every_layer_is_fused_and_equals_stock(batch: dict[str, Tensor], changes: Any) -> None:
    stock, model = build(**changes), fasttune.patch(build(**changes), strict=True)
    assert_same(model, stock, batch)
    report = fasttune.report(model)["lora"]
    assert (report.fused, report.original) == (14, {})
    fasttune.verify(model, batch)
    fasttune.unpatch(model)
    assert torch.equal(step(model, batch)["loss"], step(stock, batch)["loss"])


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_as_near_to_the_truth_as_stock(batch: dict[str, Tensor], autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    stock, model = build(dtype), fasttune.patch(build(dtype))
    exact = step(build(dtype).double(), batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = step(model, batch), step(stock, batch)

    def error(of: dict[str, Tensor]) -> float:
        parts = [(of[n].double() - exact[n].double()).square().sum() for n in exact]
        return float(torch.stack(parts).sum().sqrt())

    assert {n: g.dtype for n, g in ours.items()} == {n: g.dtype for n, g in theirs.items()}
    assert error(ours) <= 1.5 * error(theirs)
    assert fasttune.report(model)["lora"].fused == 14


def test_dropout_is_the_op_s_and_verifies(batch: dict[str, Tensor]) -> None:
    model = fasttune.patch(build(lora_dropout=0.2), strict=True)
    torch.manual_seed(3)
    first = step(model, batch)
    torch.manual_seed(3)
    again = step(model, batch)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not torch.equal(step(model, batch)["loss"], first["loss"])
    fasttune.verify(model, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_that_is_off_equals_stock(batch: dict[str, Tensor], dtype: torch.dtype) -> None:
    """PEFT then still makes a second base product, in fp32 under fp32 adapters."""

    def made() -> Any:
        model = build(dtype, lora_dropout=0.2)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        return model

    stock, model, truth = made(), fasttune.patch(made()), made().double()
    ours, theirs, exact = (step(each, batch) for each in (model, stock, truth))

    def error(of: dict[str, Tensor]) -> float:
        parts = [(of[n].double() - exact[n].double()).square().sum() for n in exact]
        return float(torch.stack(parts).sum().sqrt())

    assert error(ours) <= 1.5 * error(theirs)
    fasttune.verify(model, batch)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_mask(batch: dict[str, Tensor], use_reentrant: bool) -> None:
    model = fasttune.patch(build(lora_dropout=0.2))
    torch.manual_seed(3)
    expected = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    ours = step(model, batch)
    for name, value in expected.items():
        assert relative(ours[name], value) <= TOLERANCE, name


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "magnitude"])
def test_frozen_parts(batch: dict[str, Tensor], part: str) -> None:
    stock, model = build(), fasttune.patch(build())
    for each in (stock, model):
        for name, parameter in each.named_parameters():
            if part in name:
                parameter.requires_grad_(False)
    assert_same(model, stock, batch)


def test_the_norm_follows_every_change_of_the_base(batch: dict[str, Tensor]) -> None:
    stock, model = build(), fasttune.patch(build())
    assert_same(model, stock, batch)
    for each in (stock, model):
        each.merge_adapter()
        each.unmerge_adapter()
    assert_same(model, stock, batch)
    for each in (stock, model):
        layer = each.base_model.model.model.layers[0].mlp.up_proj
        layer.base_layer.weight.data.mul_(1.5)  # no version counter sees this
        layer.scaling["default"] *= 2
    assert_same(model, stock, batch)
    changed = {name: value * 1.25 for name, value in stock.state_dict().items()}
    for each in (stock, model):
        each.load_state_dict(changed)
    assert_same(model, stock, batch)
    for each in (stock, model):
        each.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)
    assert_same(model, stock, batch)


def test_disabled_saved_and_merged(batch: dict[str, Tensor], tmp_path: Path) -> None:
    stock, model = build(), fasttune.patch(build())
    with stock.disable_adapter(), model.disable_adapter():
        expected = stock(**batch).loss
        assert relative(model(**batch).loss, expected) <= 1e-6
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    ids = batch["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_what_is_not_covered_has_a_reason(batch: dict[str, Tensor]) -> None:
    stock, model = build(), build()
    for each in (stock, model):
        torch.manual_seed(7)
        each.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"]))
        each.base_model.set_adapter(["default", "second"])
    fasttune.patch(model)
    ours, expected = step(model, batch), step(stock, batch)
    for name, value in expected.items():
        assert relative(ours[name], value) <= TOLERANCE, name
    assert fasttune.report(model)["lora"].original == {"LoRA variant DoraLinearVariant": 2}
    hooked = fasttune.patch(build())
    layer = hooked.base_model.model.model.layers[0].mlp.up_proj
    layer.base_layer.register_forward_hook(lambda *args: None)
    step(hooked, batch)
    reasons = fasttune.report(hooked)["lora"].original
    assert reasons == {"DoRA on a base whose own forward must run": 1}


def test_dora_on_the_head_is_left_to_peft(batch: dict[str, Tensor]) -> None:
    names = ["q_proj", "lm_head"]
    stock, model = build(target_modules=names), fasttune.patch(build(target_modules=names))
    ours, expected = step(model, batch), step(stock, batch)
    for name, value in expected.items():
        assert relative(ours[name], value) <= TOLERANCE, name


def test_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    def made() -> Any:
        torch.manual_seed(0)
        base = nn.Sequential(Conv1D(48, 64))
        config = LoraConfig(r=4, target_modules=["0"], use_dora=True, fan_in_fan_out=True)
        model = get_peft_model(base, config)
        nn.init.normal_(model.base_model.model[0].lora_B["default"].weight, std=0.1)
        return model.train()

    stock, model = made(), fasttune.patch(made(), strict=True)
    x = torch.randn(2, 9, 64)
    for each in (stock, model):
        each(x).square().sum().backward()
    expected, ours = gradients(stock), gradients(model)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert relative(ours[name], value) <= TOLERANCE, name
    assert fasttune.report(model)["lora"].fused == 1


def test_the_factored_norm_is_that_of_the_sum() -> None:
    weight, a, b = torch.randn(70, 40), torch.randn(5, 40), torch.randn(70, 5)
    truth = torch.linalg.vector_norm(weight.double() + 0.7 * (b @ a).double(), dim=1)
    assert relative(dora_weight_norm(weight, a, b, 0.7), truth) < 1e-6
    half = dora_weight_norm(weight.bfloat16(), a, b, 0.7)
    assert half.dtype == torch.float32
    opposite = dora_weight_norm(b @ a, a, b, -1.0)  # the sum is zero: no NaN
    assert bool((opposite >= 0).all()) and float(opposite.max()) < 1e-1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "features", "rank"), [(70, 40, 5), (300, 1000, 16), (9, 2050, 70)]
)
def test_norms_in_cpp(rows: int, features: int, rank: int, dtype: torch.dtype) -> None:
    weight = torch.randn(rows, 2 * features).to(dtype)[:, :features]
    a, b = torch.randn(rank, features), torch.randn(rows, rank) / rank
    assert _native.takes_row_norms(weight, a)
    truth = torch.linalg.vector_norm(weight.double() + 0.7 * b.double() @ a.double(), dim=1)
    found = _native.row_norms(weight, a, b, 0.7)[0]
    assert float(((found - truth) / truth).abs().max()) < 1e-6
    opposite = _native.row_norms((b @ a).to(dtype), a, b, -1.0)[0]
    assert bool((opposite >= 0).all()) and float(opposite.max()) < 0.3
    weight[1, 3] = float("nan")
    assert _native.row_norms(weight, a, b, 0.7)[0].isnan().nonzero().flatten().tolist() == [1]
    for other in (weight.t().contiguous().t(), weight[:0]):
        assert not _native.takes_row_norms(other, a)
    assert not _native.takes_row_norms(weight, torch.randn(257, features))


@pytest.mark.parametrize("rows", [1, 16, 64, 65, 130])
def test_products_in_fp32_of_operands_in_bf16(rows: int) -> None:
    """Of few rows as a down-projection of the weight, of more on tiles, or through fp32."""
    x, weight = torch.randn(rows, 96).bfloat16(), torch.randn(80, 96).bfloat16()
    truth = x.double() @ weight.double().t()
    wide = torch.stack((weight, -weight), -1).float()
    layouts = (weight, weight.t().contiguous().t(), weight.repeat(1, 2).view(80, 2, 96)[:, 1])
    apart = weight.repeat_interleave(2, 1)[:, ::2]
    negative = torch.view_as_complex(wide).conj().imag
    assert negative.is_neg() and apart.stride(1) == 2
    for other in (*layouts, apart, negative):
        kept = _product_in_fp32(x, other, keep=True)
        _product_in_fp32(x + 1, other, keep=True)  # would overwrite what is in a scratch buffer
        assert kept.dtype == torch.float32 and kept.is_contiguous()
        assert relative(kept, truth) < 1e-6


def test_wrong_arguments() -> None:
    x, weight, a, b = (torch.randn(*s) for s in ((3, 8), (6, 8), (2, 8), (6, 2)))
    with pytest.raises(ValueError, match="magnitude"):
        dora_linear(x, weight, a, b, torch.ones(5))
    with pytest.raises(ValueError, match="dropout_p"):
        dora_linear(x, weight, a, b, torch.ones(6), dropout_p=1.5)
    with pytest.raises(TypeError, match="weight: expected x's dtype"):
        dora_linear(x, weight.bfloat16(), a, b, torch.ones(6))


def test_counted_at_the_size_of_a_large_model() -> None:
    """4096 x 4096, M 2048: no product of the adapters, no identity, less traffic, less saved."""
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16))
        config = LoraConfig(r=16, target_modules=["0"], use_dora=True, init_lora_weights=False)
        stock = get_peft_model(base, config).train()
        x = torch.empty(2048, 4096, dtype=torch.bfloat16, requires_grad=True)
    theirs = accounting.count(stock, x)
    ours = accounting.count(fasttune.patch(stock, strict=True), x)
    assert ours.bytes_moved < 0.5 * theirs.bytes_moved
    assert ours.saved_bytes < 0.35 * theirs.saved_bytes

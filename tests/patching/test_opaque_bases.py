"""Bases whose own forward must run keep it and get the fused branches: quantised, hooked, own
classes; and bases that store their weight the other way round."""

from __future__ import annotations

import copy
import importlib
import sys
import types
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_models import gradients, relative, tiny_llama, with_lora
from torch import Tensor, nn

import fasttune

# Stock rounds the branch to the base's dtype before it adds it, fasttune once at the end.
FP32, BF16 = 2e-5, 2e-2


def step(model: nn.Module, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(leaf)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype))
    assert leaf.grad is not None
    return {"y": y.detach(), "dx": leaf.grad, **gradients(model)}


def assert_fused_and_equal(model: nn.Module, x: Tensor, tolerance: float) -> None:
    stock = step(model, x)
    fasttune.patch(model, kinds={"lora"}, strict=True)
    ours = step(model, x)
    report = fasttune.report(model)["lora"]
    assert report.fused == len(fasttune.explain(model).layers), str(report)
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        assert ours[name].dtype == expected.dtype, name
        assert relative(ours[name], expected) <= tolerance, name
    assert relative(ours["y"], model_without_adapters(model, x)) > 1e-3  # the branch counts
    fasttune.verify(model, x, loss_fn=lambda m, b: m(b).float().square().mean())
    fasttune.unpatch(model)
    assert torch.equal(step(model, x)["y"], stock["y"])


def model_without_adapters(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        y: Tensor = model(x)
    return y


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def net(layer: nn.Module, **changes: Any) -> nn.Module:
    return with_lora(Net(layer), target_modules=["layer"], **changes).train()


def inputs(dtype: torch.dtype = torch.float32, features: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 9, features, generator=generator).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subclass_of_linear_keeps_its_forward(dtype: torch.dtype, bias: bool) -> None:
    class Shifted(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input) + 1

    torch.manual_seed(0)
    model = net(Shifted(64, 48, bias=bias, dtype=dtype))
    assert_fused_and_equal(model, inputs(dtype), FP32 if dtype == torch.float32 else BF16)


def test_a_hook_on_the_base_changes_the_output() -> None:
    torch.manual_seed(0)
    model = net(nn.Linear(64, 48))
    calls = []
    base = model.base_model.model.layer.base_layer
    base.register_forward_hook(lambda m, args, y: calls.append(m) or y * 3)
    fasttune.patch(model, kinds={"lora"}, strict=True)
    step(model, inputs())
    assert calls == [base]
    assert_fused_and_equal(fasttune.unpatch(model), inputs(), FP32)


def test_a_base_that_is_trained_gets_its_gradient() -> None:
    class Own(nn.Linear):
        pass

    torch.manual_seed(0)
    model = net(Own(64, 48))
    model.base_model.model.layer.base_layer.weight.requires_grad_(True)
    model.base_model.model.layer.base_layer.bias.requires_grad_(True)
    assert_fused_and_equal(model, inputs(), FP32)
    assert sum("base_layer" in name for name in step(model, inputs())) == 2


def test_several_adapters_and_a_lora_bias() -> None:
    class Own(nn.Linear):
        pass

    torch.manual_seed(0)
    model = net(Own(64, 48), lora_bias=True)
    model.add_adapter("second", LoraConfig(r=7, lora_alpha=3, target_modules=["layer"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    model.base_model.set_adapter(["default", "second"])
    assert_fused_and_equal(model, inputs(), FP32)


def test_dropout_is_drawn_per_call_and_keeps_its_share() -> None:
    class Zero(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return torch.zeros(*input.shape[:-1], self.out_features)

    model = net(Zero(64, 64), lora_dropout=0.5, r=64, lora_alpha=64)
    layer = model.base_model.model.layer
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(64))
        layer.lora_B["default"].weight.copy_(torch.eye(64))
    fasttune.patch(model, kinds={"lora"}, strict=True)
    y = model(torch.ones(400, 64))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert abs(float(y.mean()) - 1) < 0.05
    assert not torch.equal(y, model(torch.ones(400, 64)))


def test_an_output_of_another_kind_takes_peft_s_forward() -> None:
    class Integers(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).round().long()

    torch.manual_seed(0)
    model = net(Integers(64, 48))
    expected = model(inputs())
    fasttune.patch(model, kinds={"lora"})
    assert torch.equal(model(inputs()), expected)
    (layer,) = fasttune.explain(model).layers
    assert any("other than a plain float tensor" in reason for reason in layer.fallbacks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_conv1d_of_gpt2(dtype: torch.dtype, trained: bool) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = net(Conv1D(48, 64).to(dtype), fan_in_fan_out=True, lora_bias=True)
    base = model.base_model.model.layer.base_layer
    base.weight.requires_grad_(trained)
    assert_fused_and_equal(model, inputs(dtype), FP32 if dtype == torch.float32 else BF16)
    if trained:
        assert base.weight.grad.shape == (64, 48)
    fasttune.patch(model, kinds={"lora"})
    model(inputs(dtype))
    assert fasttune.explain(model).layers[0].saved_bytes > 0


# ---------------------------------------------------------------------------- quantised


def quantised_llama(quantise: Any, flag: str = "", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny Llama whose projections went through ``quantise(linear)``, then LoRA."""
    model = tiny_llama(hidden_size=128, intermediate_size=128).to(dtype)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, quantise(child))
    if flag:
        setattr(model, flag, True)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return with_lora(model, target_modules=names).train()


def assert_a_llama_is_fused_and_equal(model: nn.Module, expected: str, tolerance: float) -> None:
    tokens = torch.randint(3, 499, (2, 23), generator=torch.Generator().manual_seed(3))

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return {"loss": loss.detach(), **gradients(model)}

    classes = {type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")}
    assert classes == {expected}
    stock = run()
    fasttune.patch(model, strict=True)
    ours = run()
    report = fasttune.report(model)["lora"]
    assert report.fused == 14, str(report)
    assert ours.keys() == stock.keys()
    for name, value in stock.items():
        assert relative(ours[name], value) <= tolerance, name


def _four_bits(linear: nn.Linear, kind: str) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=linear.weight.dtype,
        quant_type=kind,
    )
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type=kind)
    return layer.to("cpu")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_four_bits(kind: str) -> None:
    model = quantised_llama(lambda m: _four_bits(m, kind), "is_loaded_in_4bit")
    assert_a_llama_is_fused_and_equal(model, "Linear4bit", 5e-5)


def test_bitsandbytes_eight_bits() -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def quantise(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
        )
        layer.weight = bnb.nn.Int8Params(
            linear.weight.data, requires_grad=False, has_fp16_weights=False
        )
        return layer.to("cpu")

    # The base quantises its input row by row: a value that falls to the other side of a step moves
    # by 1 / 254 of the row's largest.
    model = quantised_llama(quantise, "is_loaded_in_8bit")
    assert_a_llama_is_fused_and_equal(model, "Linear8bitLt", 1 / 254)


def test_torchao_eight_bits() -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def quantise(linear: nn.Linear) -> nn.Module:
        holder = nn.Sequential(linear)
        quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
        return holder[0]

    model = quantised_llama(quantise)
    assert_a_llama_is_fused_and_equal(model, "TorchaoLoraLinear", 5e-5)


class Quantised(nn.Module):
    """What PEFT's layers for other libraries ask of a quantised linear layer."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = features, outputs
        self.infeatures, self.outfeatures = features, outputs
        generator = torch.Generator().manual_seed(7)
        codes = torch.randint(-8, 8, (outputs, features), generator=generator)
        self.register_buffer("qweight", codes.to(torch.int8))
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 64)


def _peft_layer(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """PEFT's layer class; its library, where PEFT asks for one, is an empty stand-in."""
    library = {"hqq": ("hqq.core.quantize", "HQQLinear"), "eetq": ("eetq", "EetqLinear")}.get(
        module
    )
    path = f"peft.tuners.lora.{module}"
    if library is not None:
        package, linear = library
        parts = package.split(".")
        for end in range(1, len(parts) + 1):
            stand_in = types.ModuleType(".".join(parts[:end]))
            monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
        setattr(sys.modules[package], linear, Quantised)
        monkeypatch.setattr(f"peft.import_utils.is_{module}_available", lambda: True)
        monkeypatch.delitem(sys.modules, path, raising=False)
    layer: type[nn.Module] = getattr(importlib.import_module(path), name)
    return layer


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("gptq", "GPTQLoraLinear"),
        ("awq", "AwqLoraLinear"),
        ("aqlm", "AqlmLoraLinear"),
        ("eetq", "EetqLoraLinear"),
        ("hqq", "HqqLoraLinear"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interfaces_of_other_libraries(
    module: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer_class = _peft_layer(module, name, monkeypatch)
    model = net(nn.Linear(64, 48, dtype=dtype))  # for the config and the PeftModel around it
    config = copy.copy(model.peft_config["default"])
    torch.manual_seed(1)
    base = Quantised(64, 48)
    layer = layer_class(base, "default", config=config, r=4, lora_alpha=8)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    model.base_model.model.layer = layer.train()

    assert_fused_and_equal(model, inputs(dtype), FP32 if dtype == torch.float32 else BF16)

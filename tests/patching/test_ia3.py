"""PEFT's (IA)^3 layers, fused by class swap: stock against patched."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, get_peft_model
from peft.tuners.ia3.layer import IA3Layer
from tiny_models import gradients, relative, tiny_llama
from torch import Tensor, nn

import fasttune
from fasttune.ops import ia3_scale
from fasttune.patching import ia3
from fasttune.testing.accounting import count

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TARGETS = {
    "target_modules": ["k_proj", "v_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
}


def away_from_one(model: nn.Module) -> nn.Module:
    """Random vectors, so that every factor counts; the same in every model."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


def build(dtype: torch.dtype = FP32, **changes: Any) -> Any:
    base = tiny_llama().to(dtype)
    return away_from_one(get_peft_model(base, IA3Config(**{**TARGETS, **changes}))).train()


def ia3_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, IA3Layer)]


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
    report = fasttune.report(model)["ia3"]
    assert not report.original, str(report)
    return report.fused


# ---------------------------------------------------------------------------- one layer


def one_layer(feedforward: bool, dtype: torch.dtype = FP32, base: nn.Module | None = None) -> Any:
    torch.manual_seed(4)
    layer = nn.Linear(24, 40) if base is None else base
    config = IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [])
    return away_from_one(get_peft_model(nn.Sequential(layer).to(dtype), config)).train()


def layer_step(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> dict[str, Any]:
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast or BF16, enabled=autocast is not None):
        y = model(leaf)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype))
    return {"y": y.detach(), "dx": leaf.grad, **gradients(model)}


BOTH = pytest.mark.parametrize("feedforward", [True, False])


@BOTH
@pytest.mark.parametrize(
    ("dtype", "vector", "autocast"),
    [
        (FP32, FP32, None),
        (BF16, FP32, None),
        (BF16, BF16, None),
        (FP16, FP32, None),
        (FP32, FP32, BF16),
        (BF16, FP32, BF16),
    ],
)
def test_outputs_are_bit_equal_and_gradients_close(
    feedforward: bool, dtype: torch.dtype, vector: torch.dtype, autocast: torch.dtype | None
) -> None:
    model = one_layer(feedforward, dtype)
    for layer in ia3_layers(model):
        layer.ia3_l.to(vector)
    x = torch.randn(2, 9, 24).to(dtype)
    stock = layer_step(model, x, autocast)
    ours = layer_step(fasttune.patch(model, strict=True), x, autocast)
    assert fused(model) == 1
    assert ours.keys() == stock.keys() and any("ia3_l" in name for name in ours)
    for name, expected in stock.items():
        assert ours[name].dtype == expected.dtype
        if "ia3_l" in name:  # summed in fp32, where torch's product is rounded first
            assert relative(ours[name], expected) <= {FP32: 1e-5}.get(vector, 2e-2)
        elif name == "y" or not feedforward:
            assert torch.equal(ours[name], expected), name
        else:
            assert relative(ours[name], expected) <= 1e-6
    fasttune.unpatch(model)
    again = layer_step(model, x, autocast)
    assert all(torch.equal(again[name], expected) for name, expected in stock.items())


@BOTH
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 4, 24), (0, 24)])
def test_input_shapes(feedforward: bool, shape: tuple[int, ...]) -> None:
    model, x = one_layer(feedforward), torch.randn(shape)
    stock = layer_step(model, x)
    ours = layer_step(fasttune.patch(model, strict=True), x)
    assert fused(model) == 1
    assert_same(ours, stock, 1e-5)


def test_conv1d_of_gpt2(batch: dict[str, Tensor]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def made() -> Any:
        torch.manual_seed(0)
        config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=499, n_positions=64)
        targets = {
            "target_modules": ["c_attn", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"],
        }
        model = get_peft_model(GPT2LMHeadModel(config), IA3Config(fan_in_fan_out=True, **targets))
        model.base_model.eval()  # without dropout, whose masks would differ
        return away_from_one(model)

    stock, model = made(), fasttune.patch(made(), strict=True)
    assert_same(step(model, batch), step(stock, batch), 2e-5)
    assert fused(model) == 4
    fasttune.verify(model, batch)


# ---------------------------------------------------------------------------- a model


def test_loss_and_gradients_equal_stock(batch: dict[str, Tensor]) -> None:
    stock, model = build(), build()
    expected = step(stock, batch)
    before = step(model, batch)
    fasttune.patch(model, strict=True)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert_same(step(model, batch), expected, 2e-5)
    assert fused(model) == 6
    assert not fasttune.report(model)["lora"].original
    for layer in ia3_layers(model):
        assert (type(layer).__name__, type(layer).__module__) == ("Linear", "peft.tuners.ia3.layer")
    fasttune.unpatch(model)
    assert all(type(layer) is peft.tuners.ia3.layer.Linear for layer in ia3_layers(model))
    again = step(model, batch)
    assert all(torch.equal(again[name], value) for name, value in before.items())


def test_the_scaled_hidden_state_of_a_gated_mlp_is_not_kept(batch: dict[str, Tensor]) -> None:
    model = fasttune.patch(build(), strict=True)
    model(**batch)
    layers = fasttune.explain(model)
    assert layers["layers.0.mlp.down_proj"].saved_bytes == 0  # rebuilt from gate and up
    assert layers["layers.0.self_attn.k_proj"].saved_bytes == batch["input_ids"].numel() * 32 * 4


def test_two_active_adapters_multiply(batch: dict[str, Tensor]) -> None:
    def made() -> Any:
        model = build()
        other = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        model.add_adapter("second", IA3Config(**other))
        model.base_model.set_adapter(["default", "second"])
        return away_from_one(model)

    stock, model = made(), fasttune.patch(made(), strict=True)
    expected, ours = step(stock, batch), step(model, batch)
    assert sum(".second" in name for name in ours) == 4
    assert_same(ours, expected, 2e-5)
    assert fused(model) == 6
    fasttune.verify(model, batch)


def merge_and_unmerge(model: Any) -> None:
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()


def freeze_the_vectors(model: Any) -> None:
    for layer in ia3_layers(model):
        layer.ia3_l.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)


def train_the_base(model: Any) -> None:
    for layer in ia3_layers(model):
        layer.base_layer.requires_grad_(True)


def combine(model: Any) -> None:
    model.add_adapter("second", IA3Config(**TARGETS))
    away_from_one(model)
    model.add_weighted_adapter(["default", "second"], [0.7, 0.4], "sum")
    model.set_adapter("sum")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".sum" in name)


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "merge-and-unmerge": merge_and_unmerge,
    "frozen-vectors": freeze_the_vectors,
    "trained-base": train_the_base,
    "weighted": combine,
    "checkpointing": lambda m: m.gradient_checkpointing_enable(),
    "bf16-round-trip": lambda m: m.to(BF16).to(FP32),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_after_patch(name: str, batch: dict[str, Tensor]) -> None:
    stock, model = build(), fasttune.patch(build(), strict=True)
    step(model, batch)
    for each in (stock, model):
        ACTIONS[name](each)
    assert_same(step(model, batch), step(stock, batch), 2e-5)
    assert fused(model) == 6


def test_disabled_and_merged_adapters_take_peft_s_forward(batch: dict[str, Tensor]) -> None:
    stock, model = build(), fasttune.patch(build(), kinds={"ia3"}, strict=True)
    inputs = {"input_ids": batch["input_ids"]}
    for each in (stock, model):
        each.disable_adapter_layers()
    assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    for each in (stock, model):
        each.enable_adapter_layers()
        each.merge_adapter()
    assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    explained = fasttune.explain(model)["layers.0.mlp.down_proj"]
    assert explained.fallbacks == {"adapters are disabled": 1, "adapters are merged": 1}
    assert explained.fused_calls == 0


def test_eval_and_generate_are_bit_equal(batch: dict[str, Tensor]) -> None:
    stock, model = build().eval(), fasttune.patch(build(), strict=True).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "input_ids": batch["input_ids"]}
    assert torch.equal(model.generate(**options), stock.generate(**options))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, stock(**batch).logits)


def test_deepcopy_pickle_and_saving(batch: dict[str, Tensor], tmp_path: Any) -> None:
    model = fasttune.patch(build(), strict=True)
    expected = step(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(step(other, batch), expected, 0.0)
        assert fused(other) == 6
        vectors = (ia3_layers(m)[0].ia3_l["default"] for m in (other, model))
        assert len({vector.data_ptr() for vector in vectors}) == 2
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).train()
    assert_same(step(fasttune.patch(loaded), batch), expected, 1e-6)
    merged, stock = model.merge_and_unload().eval(), build().merge_and_unload().eval()
    with torch.no_grad():
        assert torch.equal(merged(**batch).logits, stock(**batch).logits)


def test_the_input_of_a_trained_base_weight_is_kept_once() -> None:
    model = one_layer(True)
    model.base_model.model[0].base_layer.requires_grad_(True)
    fasttune.patch(model, strict=True)
    x = torch.randn(5, 24, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        model(x)
    assert [t.shape for t in saved if t.shape == x.shape] == [x.shape]


# ---------------------------------------------------------------------------- gated MLPs


def mlp_model(kind: str = "llama", dtype: torch.dtype = FP32) -> Any:
    """One gated MLP whose hidden state is scaled."""
    from transformers import LlamaConfig, Phi3Config
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    torch.manual_seed(4)
    sizes = {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 4}
    mlp = LlamaMLP(LlamaConfig(**sizes)) if kind == "llama" else Phi3MLP(Phi3Config(**sizes))
    config = IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    return away_from_one(get_peft_model(nn.Sequential(mlp).to(dtype), config)).train()


def launched(model: nn.Module, x: Tensor) -> set[str]:
    names = {launch.name for launch in count(model, x).total.launches}
    return {name for name in names if "glu" in name or "ia3" in name or "scaled_sum" in name}


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize(("dtype", "autocast"), [(FP32, None), (BF16, None), (FP32, BF16)])
def test_a_gated_mlp_scales_its_hidden_state_without_a_pass(
    kind: str, dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    model, x = mlp_model(kind, dtype), torch.randn(2, 9, 48).to(dtype)
    truth = layer_step(copy.deepcopy(model).double(), x.double())
    stock = layer_step(model, x, autocast)
    ours = layer_step(fasttune.patch(model, strict=True), x, autocast)
    assert fused(model) == 1 and fasttune.report(model)["mlp"].fused == 1
    assert ours.keys() == stock.keys() and len(ours) == 3
    for name, exact in truth.items():
        assert ours[name].dtype == stock[name].dtype
        mine, theirs = ((each[name].double() - exact).abs().max() for each in (ours, stock))
        unit = torch.finfo(ours[name].dtype).eps * exact.abs().max()
        assert mine <= 2 * theirs + 2 * unit, (name, float(mine), float(theirs))
    assert launched(model, x) == {
        "fasttune::scaled_glu_forward",
        "fasttune::scaled_glu_backward",
        "fasttune::scaled_glu_backward.dscale",
    }
    fasttune.verify(model, x, loss_fn=lambda m, b: m(b).square().mean())


def test_a_hooked_down_projection_is_called_with_the_hidden_state() -> None:
    stock, model = mlp_model(), fasttune.patch(mlp_model(), strict=True)
    x, seen = torch.randn(2, 9, 48), []

    def watch(module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        seen.append(args[0].detach())
        return 2 * y

    for each in (stock, model):
        each.base_model.model[0].down_proj.register_forward_hook(watch)
    expected, ours = layer_step(stock, x), layer_step(model, x)
    assert relative(*reversed(seen)) < 1e-6
    assert_same(ours, expected, 1e-5)
    assert fused(model) == 1


def test_what_keeps_a_scale_out_of_the_mlp(batch: dict[str, Tensor]) -> None:
    """Disabled, merged or without an active adapter: the layer is called, and counts why."""
    stock, model = mlp_model(), fasttune.patch(mlp_model(), strict=True)
    x = torch.randn(2, 9, 48)
    for each in (stock, model):
        each.base_model.disable_adapter_layers()
    assert_same(layer_step(model, x), layer_step(stock, x), 1e-5)
    for each in (stock, model):
        each.base_model.enable_adapter_layers()
        each.merge_adapter()
    assert_same(layer_step(model, x), layer_step(stock, x), 1e-5)
    explained = fasttune.explain(model)["down_proj"]
    assert explained.fallbacks == {"adapters are disabled": 1, "adapters are merged": 1}
    assert explained.fused_calls == 0


def test_a_trained_down_projection_rebuilds_the_scaled_hidden_state() -> None:
    stock, model = mlp_model(), mlp_model()
    for each in (stock, model):
        each.base_model.model[0].down_proj.base_layer.requires_grad_(True)
    fasttune.patch(model, strict=True)
    x = torch.randn(2, 9, 48)
    expected, ours = layer_step(stock, x), layer_step(model, x)
    assert any("base_layer" in name for name in ours)
    assert_same(ours, expected, 1e-5)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        model(x.requires_grad_())
    assert len([t for t in saved if t.shape == (2, 9, 72)]) == 2  # gate and up


def test_the_fold_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttune.patching import mlp

    right = mlp.apply_scaled_glu
    monkeypatch.setattr(mlp, "apply_scaled_glu", lambda *args: right(*args) * 1.01)
    model = fasttune.patch(mlp_model(), strict=True)
    with pytest.raises(fasttune.VerificationError):
        fasttune.verify(model, torch.randn(2, 9, 48), loss_fn=lambda m, b: m(b).square().mean())


# ---------------------------------------------------------------------------- bases


class Doubling(nn.Linear):
    """A base whose forward is more than a product."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@BOTH
def test_a_base_with_its_own_forward_keeps_it(feedforward: bool) -> None:
    model, x = one_layer(feedforward, base=Doubling(24, 40)), torch.randn(6, 24)
    stock = layer_step(model, x)
    ours = layer_step(fasttune.patch(model, strict=True), x)
    assert_same(ours, stock, 1e-6)
    assert fused(model) == 1
    fasttune.verify(model, x, loss_fn=lambda m, b: m(b).square().mean())


@BOTH
def test_hooks_on_the_base_see_their_calls(feedforward: bool) -> None:
    model, x = one_layer(feedforward), torch.randn(6, 24)
    seen: list[Tensor] = []
    base = model.base_model.model[0].base_layer
    base.requires_grad_(True)
    base.register_forward_hook(lambda module, args, y: (seen.append(args[0].detach()), y + 1)[1])
    stock = layer_step(model, x)
    ours = layer_step(fasttune.patch(model, strict=True), x)
    assert len(seen) == 2 and torch.equal(*seen)
    assert_same(ours, stock, 1e-6)


@BOTH
def test_an_eight_bit_base_of_torchao(feedforward: bool) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = one_layer(feedforward, BF16, base=nn.Linear(64, 64))
    base = model.base_model.model[0].base_layer
    torchao.quantize_(nn.Sequential(base), torchao.Int8WeightOnlyConfig())
    x = torch.randn(6, 64).to(BF16)
    stock = layer_step(model, x)
    ours = layer_step(fasttune.patch(model, strict=True), x)
    assert torch.equal(ours["y"], stock["y"])
    assert_same(ours, stock, 2e-2)
    assert fused(model) == 1


def on_bitsandbytes(bits: int, dtype: torch.dtype) -> Any:
    """A tiny Llama whose targets are quantised, then (IA)^3."""
    bnb = pytest.importorskip("bitsandbytes")

    def quantise(linear: nn.Linear) -> nn.Module:
        shape, data = (linear.in_features, linear.out_features), linear.weight.data
        if bits == 4:
            layer = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(data, requires_grad=False, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(data, requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu")

    base: Any = tiny_llama(hidden_size=128, intermediate_size=128).to(dtype)
    for block in base.model.layers:
        for parent, name in ((block.self_attn, "k_proj"), (block.self_attn, "v_proj"),
                             (block.mlp, "down_proj")):  # fmt: skip
            setattr(parent, name, quantise(getattr(parent, name)))
    setattr(base, f"is_loaded_in_{bits}bit", True)
    return away_from_one(get_peft_model(base, IA3Config(**TARGETS))).train()


@pytest.mark.parametrize("bits", [4, 8])
def test_bases_of_bitsandbytes(bits: int, batch: dict[str, Tensor]) -> None:
    stock, model = (on_bitsandbytes(bits, FP32) for _ in range(2))
    names = {type(layer).__name__ for layer in ia3_layers(model)}
    assert names == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    fasttune.patch(model, kinds={"ia3"}, strict=True)
    expected, ours = step(stock, batch), step(model, batch)
    # Eight bits quantise the input row by row: a value on the other side of a step moves by 1 / 254
    # of the row's largest.
    assert_same(ours, expected, 5e-5 if bits == 4 else 1 / 254)
    assert fused(model) == 6


@BOTH
@pytest.mark.parametrize("bits", [4, 8])
def test_one_layer_on_bitsandbytes_in_bf16(bits: int, feedforward: bool) -> None:
    """PEFT converts to fp32 around such a base, and so does the fused layer, bit for bit."""
    block = on_bitsandbytes(bits, BF16).base_model.model.model.layers[0]
    layer = block.mlp.down_proj if feedforward else block.self_attn.k_proj
    model, x = nn.Sequential(layer), torch.randn(2, 9, 128).to(BF16)
    stock = layer_step(model, x)
    ours = layer_step(fasttune.patch(model, kinds={"ia3"}, strict=True), x)
    assert fused(model) == 1 and ours["y"].dtype == stock["y"].dtype
    assert torch.equal(ours["y"], stock["y"])
    assert_same(ours, stock, 1e-2)
    if not feedforward:
        fasttune.verify(
            model, x, loss_fn=lambda m, b: m(b.requires_grad_()).float().square().mean()
        )


@BOTH
def test_bitsandbytes_under_autocast_of_a_gpu(
    feedforward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There PEFT does not convert, and keeps the dtype of the product."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: not device)
    block = on_bitsandbytes(4, BF16).base_model.model.model.layers[0]
    layer = block.mlp.down_proj if feedforward else block.self_attn.k_proj
    model, x = nn.Sequential(layer), torch.randn(2, 9, 128).to(BF16)
    stock = layer_step(model, x)
    ours = layer_step(fasttune.patch(model, kinds={"ia3"}), x)
    assert all(torch.equal(ours[name], value) for name, value in stock.items())
    assert stock["y"].dtype == FP32
    (reason,) = fasttune.report(model)["ia3"].original
    assert reason.startswith("PEFT passes" if feedforward else "PEFT returns")


# ---------------------------------------------------------------------------- not covered


class Wrapped(nn.Linear):
    """A base that returns no plain float tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


def narrow_vector(model: Any) -> None:
    ia3_layers(model)[0].ia3_l.to(BF16)


def hidden_forward(model: Any) -> None:
    layer = ia3_layers(model)[0]
    layer.forward = type(layer).forward.__get__(layer)


def sharded_vector(model: Any) -> None:
    vectors = ia3_layers(model)[0].ia3_l
    vectors["default"] = nn.Parameter(vectors["default"].detach().as_subclass(Sharded))


class Sharded(Tensor):
    """Stands for DTensor."""


@pytest.mark.parametrize(
    ("feedforward", "base", "change", "reason"),
    [
        (True, None, narrow_vector, "PEFT rounds an input of torch.float32"),
        (False, Wrapped(24, 40), None, "its base layer returns other than a plain float tensor"),
        (True, None, sharded_vector, "adapter weights are sharded"),
        (False, None, hidden_forward, "an instance-level forward is installed"),
    ],
)
def test_what_is_not_covered_takes_peft_s_forward(
    feedforward: bool, base: nn.Module | None, change: Callable[[Any], None] | None, reason: str
) -> None:
    model, x = one_layer(feedforward, base=base), torch.randn(6, 24)
    if change is not None:
        change(model)
    stock = layer_step(model, x)
    ours = layer_step(fasttune.patch(model), x)
    assert all(torch.equal(ours[name], value) for name, value in stock.items())
    (found,) = fasttune.report(model)["ia3"].original
    assert reason in found
    if "instance-level" not in reason:
        with pytest.raises(fasttune.PatchError, match="the original path would run"):
            layer_step(fasttune.patch(model, strict=True), x)


def test_vectors_of_two_dtypes_and_extra_arguments() -> None:
    model = one_layer(False)
    model.add_adapter("second", IA3Config(target_modules=["0"], feedforward_modules=[]))
    model.base_model.set_adapter(["default", "second"])
    layer = ia3_layers(model)[0]
    layer.ia3_l["second"].data = layer.ia3_l["second"].data.to(BF16)
    fasttune.patch(model)
    layer(torch.randn(6, 24))
    with pytest.raises(TypeError):
        layer(torch.randn(6, 24), scale=None)
    assert set(fasttune.explain(model)["0"].fallbacks) == {
        "active adapters differ in dtype",
        "called with extra arguments",
    }


def test_convolutions_are_named_and_left_alone() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model = get_peft_model(base, IA3Config(target_modules=["0"], feedforward_modules=[]))
    fasttune.patch(model)
    report = fasttune.report(model)
    assert list(report["ia3"].original) == ["(IA)^3 on Conv2d is not fused yet"]
    assert not report["lora"].original


def test_a_layer_without_an_active_adapter_computes_its_base(batch: dict[str, Tensor]) -> None:
    def made() -> Any:
        model = build()
        other = IA3Config(target_modules=["v_proj"], feedforward_modules=[])
        model.add_adapter("second", other)
        model.set_adapter("second")
        return model

    stock, model = made(), fasttune.patch(made(), strict=True)
    assert_same(step(model, batch), step(stock, batch), 2e-5)
    explained = fasttune.explain(model)
    assert explained["layers.0.self_attn.k_proj"].fallbacks == {
        "no active adapter on this layer": 1
    }
    assert explained["layers.0.self_attn.v_proj"].fused_calls == 1


@pytest.mark.limits
def test_small_inputs_take_peft_s_forward() -> None:
    model = fasttune.patch(one_layer(True), strict=True)
    model(torch.randn(6, 24))
    (reason,) = fasttune.explain(model)["0"].fallbacks
    assert "for an input this small" in reason


def test_vectors_on_the_head_are_exact(batch: dict[str, Tensor]) -> None:
    changes = {"target_modules": ["lm_head", "down_proj"], "feedforward_modules": ["down_proj"]}
    stock, model = build(**changes), fasttune.patch(build(**changes))
    assert_same(step(model, batch), step(stock, batch), 2e-5)


def test_mixed_batches_are_refused(batch: dict[str, Tensor]) -> None:
    model = fasttune.patch(build())
    with (
        pytest.raises(fasttune.PatchError, match="no patched LoRA layer"),
        fasttune.mixed_adapters(model, ["default", "default"]),
    ):
        model(**batch)


# ---------------------------------------------------------------------------- compile, verify


def test_torch_compile_traces_peft_s_forward() -> None:
    model, x = fasttune.patch(one_layer(True), strict=True), torch.randn(6, 24)
    eager = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), eager, rtol=1e-6)


def test_verify_replays_every_layer(batch: dict[str, Tensor]) -> None:
    model = fasttune.patch(build(), strict=True)
    checked = {(check.layer, check.tensor) for check in fasttune.verify(model, batch).layers}
    for name, layer in model.named_modules():
        if isinstance(layer, IA3Layer):
            assert (name, "gradient of ia3_l['default']") in checked


@pytest.mark.parametrize("feedforward", [True, False])
def test_verify_finds_a_wrong_kernel(feedforward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttune.patching import replay

    def wrong(x: Tensor, scale: Tensor) -> Tensor:
        return ia3_scale(x, scale * 1.001)

    model = fasttune.patch(one_layer(feedforward), strict=True)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = model(x)
        return y.square().mean()

    fasttune.verify(model, torch.randn(6, 24), loss_fn=loss)
    for module in (ia3, replay):
        monkeypatch.setattr(module, "apply_ia3_scale", wrong)
    with pytest.raises(fasttune.VerificationError, match="0"):
        fasttune.verify(model, torch.randn(6, 24), loss_fn=loss)

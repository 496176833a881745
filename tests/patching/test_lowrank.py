"""PEFT's VeRA and AdaLoRA layers, fused by class swap: stock against patched."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import AdaLoraConfig, DeloraConfig, VeraConfig, get_peft_model
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.delora.layer import DeloraLayer
from peft.tuners.vera.layer import VeraLayer
from tiny_models import gradients, relative, tiny_llama
from torch import Tensor, nn

import fasttune
from fasttune.integrations import peft_lowrank
from fasttune.patching import lowrank, replay

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TARGETS = ["q_proj", "v_proj", "down_proj"]
METHODS = ["vera", "adalora", "delora"]
EACH = pytest.mark.parametrize("method", METHODS)


def config(method: str, targets: Any, dropout: float = 0.0, **changes: Any) -> Any:
    if method == "vera":
        own = {"r": 6, "vera_dropout": dropout, "target_modules": targets}
        return VeraConfig(**{**own, **changes})
    if method == "delora":
        own = {"r": 6, "delora_lambda": 3, "module_dropout": dropout, "target_modules": targets}
        return DeloraConfig(**{**own, **changes})
    own = {"init_r": 6, "lora_alpha": 9, "lora_dropout": dropout, "target_modules": targets}
    return AdaLoraConfig(**{"total_step": 10, "tinit": 1, "tfinal": 2, **own, **changes})


def randomised(model: nn.Module) -> nn.Module:
    """Trained tensors away from zero, so that every gradient counts; the same in every model."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lambda", "lora_A", "lora_B", "lora_E")):
            nn.init.normal_(parameter, std=0.5)
    return model


def build(method: str, dtype: torch.dtype = FP32, **changes: Any) -> Any:
    base = tiny_llama().to(dtype)
    return randomised(get_peft_model(base, config(method, TARGETS, **changes))).train()


def layers_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (VeraLayer, AdaLoraLayer, DeloraLayer))]


def step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Each gradient; those of single numbers, sums that may nearly cancel, all together."""
    assert ours.keys() == theirs.keys()
    numbers = [name for name, g in theirs.items() if g.numel() == 1 and name != "loss"]
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        if name not in numbers:
            assert relative(ours[name], expected) <= tolerance, name
    if numbers:
        a, b = (torch.cat([each[name].flatten() for name in numbers]) for each in (ours, theirs))
        assert relative(a, b) <= tolerance, numbers


def fused(model: nn.Module) -> int:
    report = fasttune.report(model)
    assert not report["lowrank"].original and not report["lora"].original, str(report)
    return report["lowrank"].fused


# ---------------------------------------------------------------------------- one layer


def one_layer(
    method: str, dtype: torch.dtype = FP32, base: nn.Module | None = None, **changes: Any
) -> Any:
    torch.manual_seed(4)
    layers = nn.Sequential(nn.Linear(24, 40) if base is None else base).to(dtype)
    return randomised(get_peft_model(layers, config(method, ["0"], **changes))).train()


def layer_step(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> dict[str, Any]:
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast or BF16, enabled=autocast is not None):
        y = model(leaf)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype))
    return {"y": y.detach(), "dx": leaf.grad, **gradients(model)}


def bounds_of_numbers(model: Any, x: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Of each trained single number n, eps |dy| |branch| / n: its gradient is dy . branch / n, up
    to the sign, and every rounding of dy or of the branch to ``dtype`` moves it by less.
    """
    with torch.no_grad():
        y = model(x)
        with model.disable_adapter():
            branch = y - model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    product = torch.finfo(dtype).eps * float(dy.norm() * branch.norm())
    named = model.named_parameters()
    return {
        name: product / abs(float(number))
        for name, number in named
        if number.numel() == 1 and number.requires_grad
    }


def assert_as_near(
    ours: dict[str, Tensor],
    stock: dict[str, Tensor],
    truth: Any,
    numbers: dict[str, float],
) -> None:
    """The rule of every kernel: twice stock's distance from fp64, and two units in the last place
    of the largest value; of a gradient that is a single number (one sum over all elements, where
    stock's error may be small by luck), one unit of each of its terms: ``numbers``.
    """
    assert ours.keys() == stock.keys() == truth.keys()
    for name, exact in truth.items():
        if name in numbers:
            assert (ours[name].double() - exact).abs() <= numbers[name], name
            continue
        mine, theirs = ((each[name].double() - exact).abs().max() for each in (ours, stock))
        assert ours[name].dtype == stock[name].dtype, name
        unit = torch.finfo(ours[name].dtype).eps * exact.abs().max()
        assert mine <= 2 * theirs + 2 * unit, (name, float(mine), float(theirs))


@EACH
@pytest.mark.parametrize(
    ("dtype", "adapter", "autocast"),
    [
        (FP32, FP32, None),
        (BF16, FP32, None),
        (BF16, BF16, None),
        (FP16, FP32, None),
        (FP32, FP32, BF16),
        (BF16, FP32, BF16),
    ],
)
def test_a_layer_is_as_near_to_the_truth_as_stock(
    method: str, dtype: torch.dtype, adapter: torch.dtype, autocast: torch.dtype | None
) -> None:
    model = one_layer(method, dtype)
    if adapter != FP32:
        model.to(adapter)
    x = torch.randn(2, 9, 24).to(dtype)
    wide = copy.deepcopy(model).double()
    truth = layer_step(wide, x.double())
    numbers = bounds_of_numbers(wide, x.double(), autocast or dtype)
    stock = layer_step(model, x, autocast)
    ours = layer_step(fasttune.patch(model, strict=True), x, autocast)
    assert fused(model) == 1
    trained = {
        "vera": ("lambda_d", "lambda_b"),
        "adalora": ("lora_A", "lora_E", "lora_B"),
        "delora": ("delora_A", "delora_B", "delora_lambda"),
    }[method]
    assert all(any(part in name for name in ours) for part in trained)
    assert_as_near(ours, stock, truth, numbers)
    fasttune.unpatch(model)
    again = layer_step(model, x, autocast)
    assert all(torch.equal(again[name], expected) for name, expected in stock.items())


@EACH
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 4, 24), (0, 24)])
def test_input_shapes(method: str, shape: tuple[int, ...]) -> None:
    model, x = one_layer(method), torch.randn(shape)
    stock = layer_step(model, x)
    ours = layer_step(fasttune.patch(model, strict=True), x)
    assert fused(model) == 1
    assert_same(ours, stock, 1e-5)


@pytest.mark.parametrize("method", ["vera", "adalora"])  # DeLoRA takes nn.Linear only
def test_conv1d_of_gpt2(method: str, batch: dict[str, Tensor]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def made() -> Any:
        torch.manual_seed(0)
        base = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=499, n_positions=64)
        own = config(method, ["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
        model = randomised(get_peft_model(GPT2LMHeadModel(base), own))
        model.base_model.eval()  # without dropout, whose masks would differ
        return model

    stock, model = made(), fasttune.patch(made(), strict=True)
    assert_same(step(model, batch), step(stock, batch), 5e-5)
    assert fused(model) == 4
    fasttune.verify(model, batch)


@EACH
@pytest.mark.parametrize("autocast", [None, BF16])
def test_dropout_is_the_op_s_and_replays(method: str, autocast: torch.dtype | None) -> None:
    model, x = fasttune.patch(one_layer(method, dropout=0.3), strict=True), torch.randn(50, 24)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16, enabled=autocast is not None):
            y: Tensor = model(x)
        return y.float().square().mean()

    checked = {check.tensor for check in replay.check_layers(model, x, loss)}
    wanted = {"gradient of rank_scale[0]"}
    wanted |= {"gradient of out_scale[0]"} if method == "vera" else {"gradient of lora_B[0]"}
    assert wanted <= checked
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(x), model(x))
    if autocast is None:
        fasttune.verify(model, x, loss_fn=loss)


# ---------------------------------------------------------------------------- memory


def saved_by(call: Callable[[], Any]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        call()
    return saved


def test_the_shared_matrices_of_vera_are_not_copied(batch: dict[str, Tensor]) -> None:
    """What a layer keeps for backward of A and B is the storage that all layers share."""
    model = fasttune.patch(build("vera"), kinds={"lowrank"}, strict=True)
    shared = {buffer.untyped_storage().data_ptr() for buffer in model.base_model.vera_A.values()}
    shared |= {buffer.untyped_storage().data_ptr() for buffer in model.base_model.vera_B.values()}
    layer = layers_of(model)[0]
    x = torch.randn(11, layer.in_features, requires_grad=True)
    kept = saved_by(lambda: layer(x))
    factors = [t for t in kept if t.shape in ((6, layer.in_features), (layer.out_features, 6))]
    assert len(factors) == 2
    assert all(t.untyped_storage().data_ptr() in shared for t in factors)
    assert not any(t.shape == x.shape for t in kept)  # nor is the input kept: A is frozen
    assert fasttune.explain(model)["layers.0.self_attn.q_proj"].saved_bytes == 11 * 6 * 4


def test_nothing_of_the_size_of_a_factor_waits_for_the_backward() -> None:
    """Of all tensors alive between forward and backward, none but the buffers has B's shape."""

    def of_their_shape() -> list[Tensor]:
        gc.collect()
        return [t for t in gc.get_objects() if type(t) is Tensor and t.shape in ((40, 6), (6, 24))]

    others = of_their_shape()  # held by earlier tests
    model = fasttune.patch(one_layer("vera"), strict=True)
    y = model(torch.randn(7, 24, requires_grad=True))
    known = {id(t) for t in others}
    alive = [t for t in of_their_shape() if id(t) not in known]
    own = {t.untyped_storage().data_ptr() for t in layers_of(model)[0].vera_A.values()}
    own |= {t.untyped_storage().data_ptr() for t in layers_of(model)[0].vera_B.values()}
    assert alive and all(t.untyped_storage().data_ptr() in own for t in alive)
    y.sum().backward()


# ---------------------------------------------------------------------------- a model


@EACH
def test_loss_and_gradients_equal_stock(method: str, batch: dict[str, Tensor]) -> None:
    stock, model = build(method), build(method)
    expected = step(stock, batch)
    before = step(model, batch)
    classes = [type(layer) for layer in layers_of(model)]
    fasttune.patch(model, strict=True)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert_same(step(model, batch), expected, 5e-5)
    assert fused(model) == 6
    names = [(each.__name__, each.__module__) for each in classes]
    assert [(type(m).__name__, type(m).__module__) for m in layers_of(model)] == names
    checked = {check.layer for check in fasttune.verify(model, batch).layers}
    assert {name for name, m in model.named_modules() if m in layers_of(model)} <= checked
    fasttune.unpatch(model)
    assert [type(layer) for layer in layers_of(model)] == classes
    again = step(model, batch)
    assert all(torch.equal(again[name], value) for name, value in before.items())


def test_orthogonality_and_allocation_of_adalora(batch: dict[str, Tensor]) -> None:
    """Ten steps with PEFT's regularisation and rank allocation: the same budget, ranks and
    weights as stock.
    """
    changes = {"deltaT": 1, "target_r": 2, "task_type": "CAUSAL_LM"}
    stock, model = (build("adalora", **changes) for _ in range(2))
    fasttune.patch(model, strict=True)
    for each in (stock, model):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.02)
        for index in range(10):
            step(each, batch)
            optimizer.step()
            each.base_model.update_and_allocate(index)
    patterns = [m.peft_config["default"].rank_pattern for m in (stock, model)]
    assert patterns[0] == patterns[1]
    kept = [sum(pattern) for pattern in patterns[0].values()]
    assert sum(kept) == 2 * 6 and len(set(kept)) > 1
    assert fused(model) == 6
    for (name, theirs), ours in zip(stock.named_parameters(), model.parameters(), strict=True):
        assert relative(ours, theirs) <= 1e-4, name
    with torch.no_grad():
        regularised, expected = (m(**batch).loss for m in (model, stock))
        assert relative(regularised, expected) <= 1e-5
        assert float(regularised - model.base_model.model(**batch).loss) > 0.1


@EACH
def test_two_active_adapters(method: str, batch: dict[str, Tensor]) -> None:
    def made() -> Any:
        model = build(method)
        other = {"inference_mode": True} if method == "adalora" else {}
        model.add_adapter("second", config(method, ["q_proj", "down_proj"], **other))
        model.base_model.set_adapter(["default", "second"])
        for layer in layers_of(model):
            layer.requires_grad_(True)
            for ranknum in getattr(layer, "ranknum", {}).values():
                ranknum.requires_grad_(False)
            layer.base_layer.requires_grad_(False)
        return randomised(model)

    stock, model = made(), fasttune.patch(made(), strict=True)
    expected, ours = step(stock, batch), step(model, batch)
    assert any(".second" in name for name in ours)
    assert_same(ours, expected, 5e-5)
    assert fused(model) == 6
    fasttune.verify(model, batch)


def merge_and_unmerge(model: Any) -> None:
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()


def freeze_the_adapters(model: Any) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)


def train_the_base(model: Any) -> None:
    for layer in layers_of(model):
        layer.base_layer.requires_grad_(True)


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "merge-and-unmerge": merge_and_unmerge,
    "frozen-adapters": freeze_the_adapters,
    "trained-base": train_the_base,
    "checkpointing": lambda m: m.gradient_checkpointing_enable(),
    "reentrant-checkpointing": lambda m: m.gradient_checkpointing_enable({"use_reentrant": True}),
    "dtype-round-trip": lambda m: m.to(torch.float64).to(FP32),
    "load-state-dict": lambda m: m.load_state_dict(
        {name: tensor * 0.9 for name, tensor in m.state_dict().items()}
    ),
}


@EACH
@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_after_patch(method: str, name: str, batch: dict[str, Tensor]) -> None:
    stock, model = build(method), fasttune.patch(build(method), strict=True)
    step(model, batch)
    for each in (stock, model):
        ACTIONS[name](each)
    assert_same(step(model, batch), step(stock, batch), 5e-5)
    assert fused(model) == 6


@EACH
def test_checkpointing_draws_the_same_mask(method: str, batch: dict[str, Tensor]) -> None:
    plain, checkpointed = (build(method, dropout=0.2) for _ in range(2))
    checkpointed.gradient_checkpointing_enable()
    results = []
    for model in (plain, checkpointed):
        fasttune.patch(model, strict=True)
        torch.manual_seed(6)
        results.append(step(model, batch))
    assert_same(results[1], results[0], 1e-6)
    assert fused(checkpointed) == 6


@EACH
def test_disabled_and_merged_adapters_take_peft_s_forward(
    method: str, batch: dict[str, Tensor]
) -> None:
    stock, model = build(method), fasttune.patch(build(method), kinds={"lowrank"}, strict=True)
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


@EACH
def test_eval_and_generate_are_bit_equal(method: str, batch: dict[str, Tensor]) -> None:
    stock, model = build(method).eval(), fasttune.patch(build(method), strict=True).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "input_ids": batch["input_ids"]}
    assert torch.equal(model.generate(**options), stock.generate(**options))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, stock(**batch).logits)


@EACH
def test_deepcopy_pickle_and_saving(method: str, batch: dict[str, Tensor], tmp_path: Any) -> None:
    model = fasttune.patch(build(method), strict=True)
    expected = step(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(step(other, batch), expected, 0.0)
        assert fused(other) == 6
        own, copied = (dict(m.named_parameters()) for m in (model, other))
        assert all(own[name].data_ptr() != copied[name].data_ptr() for name in own)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).train()
    assert_same(step(fasttune.patch(loaded), batch), expected, 1e-6)
    merged, stock = model.merge_and_unload().eval(), build(method).merge_and_unload().eval()
    with torch.no_grad():
        assert torch.equal(merged(**batch).logits, stock(**batch).logits)


# ---------------------------------------------------------------------------- bases


class Doubling(nn.Linear):
    """A base whose forward is more than a product."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@EACH
def test_a_base_with_its_own_forward_keeps_it(method: str) -> None:
    model, x = one_layer(method, base=Doubling(24, 40)), torch.randn(6, 24)
    stock = layer_step(model, x)
    ours = layer_step(fasttune.patch(model, strict=True), x)
    assert_same(ours, stock, 1e-6)
    assert fused(model) == 1
    fasttune.verify(model, x, loss_fn=lambda m, b: m(b).square().mean())


@EACH
def test_hooks_on_the_base_see_their_calls(method: str) -> None:
    model, x = one_layer(method), torch.randn(6, 24)
    seen: list[Tensor] = []
    base = model.base_model.model[0].base_layer
    base.register_forward_hook(lambda module, args, y: (seen.append(args[0].detach()), y + 1)[1])
    stock = layer_step(model, x)
    ours = layer_step(fasttune.patch(model, strict=True), x)
    assert len(seen) == 2 and torch.equal(*seen)
    assert_same(ours, stock, 1e-6)


def test_vera_on_an_eight_bit_base_of_torchao() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = one_layer("vera", BF16, base=nn.Linear(64, 64))
    base = model.base_model.model[0].base_layer
    torchao.quantize_(nn.Sequential(base), torchao.Int8WeightOnlyConfig())
    x = torch.randn(6, 64).to(BF16)
    stock = layer_step(model, x)
    ours = layer_step(fasttune.patch(model, strict=True), x)
    assert_same(ours, stock, 1e-2)
    assert fused(model) == 1


# ---------------------------------------------------------------------------- not covered


class Wrapped(nn.Linear):
    """A base that returns no plain float tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


class Passing(nn.Identity):
    """Stands for a dropout of another kind."""


class Sharded(Tensor):
    """Stands for DTensor."""


def sharded_scale(model: Any) -> None:
    layer = layers_of(model)[0]
    names = {VeraLayer: "vera_lambda_d", AdaLoraLayer: "lora_E", DeloraLayer: "delora_lambda"}
    (name,) = (name for kind, name in names.items() if isinstance(layer, kind))
    group = getattr(layer, name)
    group["default"] = nn.Parameter(group["default"].detach().as_subclass(Sharded))


def hooked_dropout(model: Any) -> None:
    dropouts = peft_lowrank.dropouts(layers_of(model)[0])
    dropouts["default"].register_forward_hook(lambda module, args, y: 2 * y)


def hidden_forward(model: Any) -> None:
    layer = layers_of(model)[0]
    layer.forward = type(layer).forward.__get__(layer)


def own_dropout(model: Any) -> None:
    dropouts = peft_lowrank.dropouts(layers_of(model)[0])
    dropouts["default"] = Passing()


@EACH
@pytest.mark.parametrize(
    ("base", "change", "reason"),
    [
        (Wrapped(24, 40), None, "its base layer returns other than a plain float tensor"),
        (None, sharded_scale, "adapter weights are sharded"),
        (None, hooked_dropout, "a hook on the dropout of 'default'"),
        (None, own_dropout, "dropout is Passing"),
        (None, hidden_forward, "an instance-level forward is installed"),
    ],
)
def test_what_is_not_covered_takes_peft_s_forward(
    method: str, base: nn.Module | None, change: Callable[[Any], None] | None, reason: str
) -> None:
    model, x = one_layer(method, base=copy.deepcopy(base)), torch.randn(6, 24)
    if change is not None:
        change(model)
    stock = layer_step(model, x)
    ours = layer_step(fasttune.patch(model), x)
    assert all(torch.equal(ours[name], value) for name, value in stock.items())
    (found,) = fasttune.report(model)["lowrank"].original
    assert reason in found
    if "instance-level" not in reason:
        with pytest.raises(fasttune.PatchError, match="the original path would run"):
            layer_step(fasttune.patch(model, strict=True), x)


def test_peft_trains_ranknum_where_it_has_cast_it() -> None:
    model, x = one_layer("adalora", BF16), torch.randn(6, 24).to(BF16)
    assert layers_of(model)[0].ranknum["default"].requires_grad
    wide = copy.deepcopy(model).double()
    truth = layer_step(wide, x.double())
    numbers = bounds_of_numbers(wide, x.double(), BF16)
    stock = layer_step(model, x)
    ours = layer_step(fasttune.patch(model, strict=True), x)
    assert list(numbers) == ["base_model.model.0.ranknum.default"]
    assert numbers.keys() <= ours.keys()
    assert_as_near(ours, stock, truth, numbers)


def test_a_rank_above_the_kernels_is_left_to_peft() -> None:
    model, x = one_layer("vera", r=257), torch.randn(6, 24)
    stock = layer_step(model, x)
    ours = layer_step(fasttune.patch(model), x)
    assert all(torch.equal(ours[name], value) for name, value in stock.items())
    (reason,) = fasttune.report(model)["lowrank"].original
    assert reason.startswith("rank 257")


def test_convolutions_are_named_and_left_alone() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model = get_peft_model(base, config("adalora", ["0"]))
    fasttune.patch(model)
    report = fasttune.report(model)
    assert list(report["lowrank"].original) == ["AdaLoRA on SVDConv2d is not fused yet"]
    assert not report["lora"].original


@EACH
def test_a_layer_without_an_active_adapter_computes_its_base(
    method: str, batch: dict[str, Tensor]
) -> None:
    def made() -> Any:
        model = build(method)
        other = {"inference_mode": True} if method == "adalora" else {}
        model.add_adapter("second", config(method, ["v_proj"], **other))
        model.base_model.set_adapter("second")
        for name, parameter in model.named_parameters():
            if ".second" in name and "ranknum" not in name:
                parameter.requires_grad_(True)
        return randomised(model)

    stock, model = made(), fasttune.patch(made(), strict=True)
    assert_same(step(model, batch), step(stock, batch), 5e-5)
    explained = fasttune.explain(model)
    assert explained["layers.0.self_attn.q_proj"].fallbacks == {
        "no active adapter on this layer": 1
    }
    assert explained["layers.0.self_attn.v_proj"].fused_calls == 1


@EACH
@pytest.mark.limits
def test_small_inputs_take_peft_s_forward(method: str) -> None:
    model = fasttune.patch(one_layer(method), strict=True)
    model(torch.randn(6, 24))
    (reason,) = fasttune.explain(model)["0"].fallbacks
    assert "for an input this small" in reason


@pytest.mark.limits
def test_vera_of_a_high_rank_takes_peft_s_forward_on_the_cpu() -> None:
    x = torch.randn(512, 2048)
    for rank, reasons in (
        (129, ["the original forward is as fast for VeRA of this rank"]),
        (8, []),
    ):
        model = fasttune.patch(one_layer("vera", base=nn.Linear(2048, 64), r=rank), strict=True)
        model(x)
        assert list(fasttune.explain(model)["0"].fallbacks) == reasons


@EACH
def test_adapters_on_the_head_are_exact(method: str, batch: dict[str, Tensor]) -> None:
    def made() -> Any:
        own = config(method, ["lm_head", "q_proj"])
        return randomised(get_peft_model(tiny_llama(), own)).train()

    stock, model = made(), fasttune.patch(made())
    assert_same(step(model, batch), step(stock, batch), 5e-5)
    assert fused(model) == 3


@EACH
def test_mixed_batches_are_refused(method: str, batch: dict[str, Tensor]) -> None:
    model = fasttune.patch(build(method))
    with (
        pytest.raises(fasttune.PatchError),
        fasttune.mixed_adapters(model, ["default", "default"]),
    ):
        model(**batch)


# ---------------------------------------------------------------------------- compile, verify


@EACH
def test_torch_compile_traces_peft_s_forward(method: str) -> None:
    model, x = fasttune.patch(one_layer(method), strict=True), torch.randn(6, 24)
    eager = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), eager, rtol=1e-5, atol=1e-6)


@EACH
def test_verify_finds_a_wrong_scale(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = importlib.import_module("fasttune.ops.lora_linear")  # ops names a function so
    right = op.scaled_up

    def wrong(b: Tensor, rank_scale: Any, out_scale: Any) -> Tensor:
        return right(b, None if rank_scale is None else rank_scale * 1.001, out_scale)

    model = fasttune.patch(one_layer(method), strict=True)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = model(x)
        return y.square().mean()

    fasttune.verify(model, torch.randn(6, 24), loss_fn=loss)
    monkeypatch.setattr(op, "scaled_up", wrong)
    with pytest.raises(fasttune.VerificationError, match="0"):
        fasttune.verify(model, torch.randn(6, 24), loss_fn=loss)


def test_the_kind_can_be_left_out() -> None:
    model = fasttune.patch(one_layer("vera"))
    assert lowrank.KIND in fasttune.report(model)["lowrank"].kind
    fasttune.patch(model, kinds={"norm"})
    assert type(layers_of(model)[0]) is peft.tuners.vera.layer.Linear

"""What is recognised as norm, gated MLP, activation or rotary function, and what is not."""

from __future__ import annotations

import functools
import logging
import pickle
import time
from typing import Any

import pytest
import torch
from tiny_models import gradients, loss_of, tiny_llama, with_lora
from torch import Tensor, nn
from torch.nn import functional as F

import fasttune
from fasttune.patching import activation, mlp, norm, rebind, rotary

WIDTH = 24


class Norm(nn.Module):
    """RMS norm as Llama writes it; subclasses deviate."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.some_small_number = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.some_small_number)
        return self.weight * x.to(dtype)


class EpsOutside(Norm):
    def forward(self, x: Tensor) -> Tensor:
        rms = x.float().pow(2).mean(-1, keepdim=True).sqrt() + self.some_small_number
        return self.weight * (x.float() / rms).to(x.dtype)


class Clamped(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-50, 50))


class TwiceTheWeight(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class InPlace(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.zero_()
        return y


class Gemma(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.float())).type_as(x)


def test_a_norm_is_known_by_its_numbers_not_its_names() -> None:
    found = norm.prove(Norm())
    assert found is not None
    assert (found.centred, found.eps, found.weight) == (False, "some_small_number", "weight")
    assert found.round_first and found.weight_offset == 0.0
    bf16 = torch.bfloat16
    assert {(bf16, bf16, None), (torch.float32, torch.float32, bf16)} <= found.proven
    gemma = norm.prove(Gemma())
    assert gemma is not None and gemma.weight_offset == 1.0 and not gemma.round_first


@pytest.mark.parametrize("module", [EpsOutside, Clamped, TwiceTheWeight, InPlace])
def test_a_norm_with_another_formula_is_left_alone_and_named(module: type[Norm]) -> None:
    assert norm.prove(module()) is None
    model = nn.Sequential(module(), nn.Linear(WIDTH, WIDTH), nn.GELU())
    fasttune.patch(model)
    assert type(model[0]) is module
    entry = fasttune.explain(model)["0"]
    assert entry.path == "skipped" and "not known" in next(iter(entry.fallbacks))


def test_layer_norms_with_and_without_bias_and_weight() -> None:
    for options in ({}, {"bias": False}, {"elementwise_affine": False}):
        found = norm.prove(nn.LayerNorm(WIDTH, **options))
        assert found is not None and found.centred, options
    assert norm.prove(nn.LayerNorm((4, WIDTH))) is None
    model = nn.Sequential(nn.GroupNorm(2, WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU())
    fasttune.patch(model)
    assert [type(m) for m in model][:2] == [nn.GroupNorm, nn.BatchNorm1d]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(40, WIDTH)
        self.a = nn.Linear(WIDTH, 40)
        self.b = nn.Linear(WIDTH, 40)
        self.drop = nn.Dropout(0.0)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return F.silu(b) * a

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.c(self.join(self.a(x), self.b(x))))


class Clipped(Gated):
    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return F.silu(b.clamp(max=7.0)) * a


class FunctionalDropout(Gated):
    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return F.dropout(F.silu(b) * a, 0.5, self.training)


class Scaled(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(WIDTH, 80), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.wi(x).chunk(2, dim=-1)
        return self.wo(up * F.gelu(gate))


def test_a_gated_mlp_is_known_by_what_its_children_see() -> None:
    plan = mlp.prove(Gated())
    assert isinstance(plan, mlp.GatedPlan)
    assert plan.inputs == ("a", "b") and plan.chain == ("c", "drop")
    assert plan.activation == "silu" and not plan.gate_first
    plan = mlp.prove(Packed())
    assert isinstance(plan, mlp.GatedPlan)
    assert plan.inputs == ("wi",) and plan.activation == "gelu" and not plan.gate_first


@pytest.mark.parametrize("module", [Clipped, FunctionalDropout, Scaled])
def test_an_mlp_that_does_more_is_left_alone(module: type[Gated]) -> None:
    assert not isinstance(mlp.prove(module()), mlp.GatedPlan)
    model = nn.Sequential(module())
    fasttune.patch(model)
    assert type(model[0]) is module


@pytest.mark.parametrize("module", [Gated, Packed])
def test_a_patched_mlp_equals_the_original(module: type[nn.Module]) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(module(), Norm()).double().float()
    x = torch.randn(3, 70, WIDTH, requires_grad=True)
    expected = torch.autograd.grad(model(x).sin().sum(), [x, *model.parameters()])
    fasttune.patch(model, strict=True)
    ours = torch.autograd.grad(model(x).sin().sum(), [x, *model.parameters()])
    assert fasttune.report(model)["mlp"].fused == 1
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.abs().max()))


def test_activations_are_known_by_their_values() -> None:
    from transformers.activations import NewGELUActivation

    known = {
        "silu": nn.SiLU(),
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU(approximate="tanh"),
    }
    for name, module in known.items():
        found = activation.prove(module)
        assert found is not None and (found.name, found.operations) == (name, 1)
    found = activation.prove(NewGELUActivation())
    assert found is not None and found.name == "gelu_tanh" and found.operations > 4
    for other in (nn.ReLU(inplace=True), nn.Identity(), nn.ELU(), nn.Dropout(0.5), nn.Softmax(-1)):
        assert activation.prove(other) is None, other


def plain_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1):
    def turn(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * cos.unsqueeze(unsqueeze_dim) + rotated * sin.unsqueeze(unsqueeze_dim)

    return turn(q), turn(k)


def wrong_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor):
    q, k = plain_rotation(q, k, cos, sin)
    return q, -k


def test_a_rotary_function_is_known_by_its_values() -> None:
    assert rotary.looks_rotary(plain_rotation) and not rotary.looks_rotary(F.dropout)
    found = rotary.prove(plain_rotation)
    assert found is not None
    assert (found.interleaved, found.tables, found.partial) == (False, "full", False)
    # A 16-bit q times an fp32 cos is fp32 here, and our op returns q's dtype.
    assert (torch.bfloat16, torch.bfloat16) in found.proven
    assert (torch.bfloat16, torch.float32) not in found.proven
    assert rotary.prove(wrong_rotation) is None


def test_a_rebound_function_sees_other_globals_through_its_decorators() -> None:
    def decorated(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs) + 1

        return wrapper

    copy = rebind.with_globals(decorated(_asks_a_global), {"_answer": lambda: 41})
    assert copy() == 42 and _asks_a_global() == 7


def _answer() -> int:
    return 7


def _asks_a_global() -> int:
    return _answer()


def test_patching_consumes_no_random_numbers_and_reads_no_weights() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    model.requires_grad_(False)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fasttune.patch(model)
    assert torch.equal(torch.get_rng_state(), before)
    report = fasttune.report(model)
    assert report["norm"].pending == 5 and report["mlp"].pending == 2
    assert all(p.device.type == "meta" for p in model.parameters())


def test_a_model_of_8b_parameters_on_meta_is_patched_in_seconds() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
                vocab_size=128256,
            )
        )
    start = time.perf_counter()
    fasttune.patch(model)
    assert time.perf_counter() - start < 20
    assert fasttune.report(model)["norm"].pending == 65
    assert fasttune.report(model)["mlp"].pending == 32


def test_a_changed_attribute_sends_an_mlp_down_its_own_path(caplog) -> None:
    class WithFloat(Gated):
        def __init__(self) -> None:
            super().__init__()
            self.limit = 1e9

        def join(self, a: Tensor, b: Tensor) -> Tensor:
            return F.silu(b.clamp(max=self.limit)) * a

    model = nn.Sequential(WithFloat())
    fasttune.patch(model)
    x = torch.randn(2, 70, WIDTH)
    model(x)
    model[0].limit = 0.01
    with caplog.at_level(logging.WARNING, logger="fasttune"):
        y = model(x)
    assert "attribute changed" in caplog.text
    fasttune.unpatch(model)
    assert torch.equal(y, model(x))


def _replace(mlp: Any) -> None:
    mlp.act = nn.GELU()


def _hook(mlp: Any) -> None:
    mlp.act.register_forward_hook(lambda module, args, y: 0.5 * y)


def _set(mlp: Any) -> None:
    mlp.act.approximate = "tanh"


@pytest.mark.parametrize("change", [_replace, _hook, _set])
def test_an_activation_inside_an_mlp_that_changes_after_patch_is_called(change: Any) -> None:
    class WithModule(Gated):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.GELU() if change is _set else nn.SiLU()

        def join(self, a: Tensor, b: Tensor) -> Tensor:
            return self.act(b) * a

    model = nn.Sequential(WithModule())
    fasttune.patch(model)
    x = torch.randn(2, 70, WIDTH)
    model(x)
    assert fasttune.report(model)["mlp"].fused == 1
    change(model[0])
    y = model(x)
    assert sum(fasttune.report(model)["mlp"].original.values()) == 1
    fasttune.unpatch(model)
    assert torch.equal(y, model(x))


def test_attributes_of_activations_and_norms_that_change_after_patch_are_followed() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
            self.eps, self.doubled = 1e-6, False

        def forward(self, x: Tensor) -> Tensor:
            y = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
            return 2 * y if self.doubled else y

    model = nn.Sequential(Norm(), nn.GELU())
    fasttune.patch(model)
    x = torch.randn(2, 70, WIDTH)
    model(x)
    report = fasttune.report(model)
    assert (report["norm"].fused, report["activation"].fused) == (1, 1)
    model[0].doubled, model[1].approximate = True, "tanh"
    y = model(x)
    fasttune.unpatch(model)
    assert torch.equal(y, model(x))


def test_a_patched_block_survives_pickle_and_deepcopy(make_lora_model, batch) -> None:
    model = fasttune.patch(make_lora_model())
    expected = model(**batch).loss
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(**batch).loss, expected)
    assert fasttune.report(twin)["norm"].fused == 5


def test_eval_without_gradients_gives_the_same_bits(batch) -> None:
    model = with_lora(tiny_llama()).eval()
    with torch.no_grad():
        expected = model(**batch).logits
        fasttune.patch(model)
        assert torch.equal(model(**batch).logits, expected)
    assert fasttune.report(model)["norm"].original == {"inference": 5}


def test_hooks_on_norms_and_mlps_still_run(make_lora_model, batch) -> None:
    model = fasttune.patch(make_lora_model(), strict=True)
    seen = []
    for name, module in model.named_modules():
        if name.endswith(("mlp", "input_layernorm")):
            module.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    model(**batch).loss.backward()
    assert len(seen) == 4
    assert fasttune.report(model)["mlp"].fused == 2


def test_under_autocast_everything_is_fused_and_nearer_to_fp32() -> None:
    """q and k are bf16 there and the angles fp32: transformers' rotation is then in fp32."""
    stock, ours, exact = (with_lora(tiny_llama()).train() for _ in range(3))
    fasttune.patch(ours, strict=True)  # a fallback would raise
    for model in (stock, ours):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, 1)
        loss.backward()
    loss_of(exact, 1).backward()
    truth = gradients(exact)

    def distance(model: nn.Module) -> float:
        found = gradients(model)
        return sum(float((found[name] - value).norm() ** 2) for name, value in truth.items()) ** 0.5

    assert distance(ours) <= 1.2 * distance(stock)
    assert fasttune.report(ours)["attention"].fused == 2


def test_a_mask_that_trained_layers_compute_gets_its_gradient() -> None:
    """Doge's mask comes from a projection of the values: our attention has no gradient for it."""
    from transformers import DogeConfig, DogeForCausalLM

    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 499}

    def build() -> nn.Module:
        torch.manual_seed(0)
        return DogeForCausalLM(DogeConfig(**options)).train()

    stock, ours = build(), fasttune.patch(build())
    for model in (stock, ours):
        loss_of(model, 1).backward()
    theirs, found = gradients(stock), gradients(ours)
    assert found.keys() == theirs.keys() and any("dt_proj" in name for name in found)
    for name, gradient in theirs.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-6), name

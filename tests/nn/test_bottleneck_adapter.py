"""BottleneckAdapter against its formula in plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import relative
from torch import Tensor, nn
from torch.nn import functional

from fasttune.nn import BottleneckAdapter
from fasttune.testing.accounting import count

H, R = 24, 6


def filled(**options: Any) -> BottleneckAdapter:
    torch.manual_seed(0)
    adapter = BottleneckAdapter(H, R, **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)
    return adapter


def results(function: Any, adapter: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    adapter.zero_grad()
    y = function(x)
    (y * torch.arange(y.numel()).view(y.shape).sin()).sum().backward()
    assert x.grad is not None
    grads = {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_agrees(adapter: BottleneckAdapter, formula: Any) -> None:
    x = torch.randn(2, 5, H)
    ours, theirs = results(adapter, adapter, x), results(formula, adapter, x)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert relative(ours[name], value) < 1e-5, name


def test_a_fresh_adapter_is_the_identity() -> None:
    x = torch.randn(2, 5, H)
    for options in ({}, {"scaling": "channels"}, {"dropout": 0.5}, {"gate": True}):
        assert torch.equal(BottleneckAdapter(H, R, **options)(x), x)


@pytest.mark.parametrize("scaling", [1.0, 0.5, "scalar", "channels"])
@pytest.mark.parametrize("activation", ["relu", "swish", "gelu_new", "identity", "leaky_relu"])
def test_it_computes_its_formula(activation: str, scaling: float | str) -> None:
    adapter = filled(activation=activation, scaling=scaling)
    function = {
        "relu": functional.relu, "swish": functional.silu, "identity": lambda z: z,
        "gelu_new": lambda z: functional.gelu(z, approximate="tanh"),
        "leaky_relu": functional.leaky_relu,
    }[activation]  # fmt: skip

    def formula(x: Tensor) -> Tensor:
        u = adapter.up(function(adapter.down(x)))
        return x + u * (adapter.scaling if adapter.scale is None else adapter.scale)

    assert_agrees(adapter, formula)


def test_norm_gate_outer_activation_and_callables() -> None:
    adapter = filled(
        activation=torch.sin, layer_norm=True, gate=True, output_activation="tanh", scaling="scalar"
    )
    assert adapter.norm is not None and adapter.gate is not None

    def formula(x: Tensor) -> Tensor:
        assert adapter.norm is not None and adapter.gate is not None
        inner = functional.layer_norm(x, (H,), adapter.norm.weight, adapter.norm.bias)
        u = torch.tanh(adapter.up(torch.sin(adapter.down(inner))))
        gate = torch.sigmoid(adapter.gate(x)).mean(1, keepdim=True)
        return x + u * gate * adapter.scale

    assert_agrees(adapter, formula)


def test_another_residual() -> None:
    adapter = filled(scaling="channels")
    residual, x = torch.randn(2, 5, H), torch.randn(2, 5, H)
    expected = residual + adapter.up(adapter.down(x).relu()) * adapter.scale
    assert relative(adapter(x, residual).detach(), expected.detach()) < 1e-6


def test_dropout_drops_the_expected_share_and_only_in_training() -> None:
    adapter = filled(dropout=0.25)
    x = torch.randn(64, 50, H)
    dropped = (adapter(x) - x == 0).float().mean()
    assert abs(float(dropped) - 0.25) < 0.01
    expected = adapter.up(adapter.down(x).relu())
    kept = adapter(x) - x
    assert torch.allclose(kept[kept != 0], (expected / 0.75)[kept != 0], atol=1e-5)
    adapter.eval()
    assert torch.allclose(adapter(x), x + expected, atol=1e-6)


def test_masks_follow_the_seed_and_checkpoints() -> None:
    from torch.utils.checkpoint import checkpoint

    adapter, x = filled(dropout=0.5), torch.randn(4, 7, H)
    both = []
    for wrap in (False, True):
        torch.manual_seed(1)
        function = (lambda x: checkpoint(adapter, x, use_reentrant=False)) if wrap else adapter
        both.append(results(function, adapter, x))
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_it_saves_the_input_and_the_narrow_pre_activation() -> None:
    adapter = filled(dropout=0.1, scaling="channels").to("meta")
    x = torch.empty(512, H, device="meta", requires_grad=True)
    # The caller holds x; and the seed of the mask.
    assert count(adapter, x).saved_bytes == 512 * R * 4 + 8


def test_state_dict_deepcopy_and_half_precision() -> None:
    adapter = filled(scaling="channels", dropout=0.1)
    assert set(adapter.state_dict()) == {
        "down.weight",
        "down.bias",
        "up.weight",
        "up.bias",
        "scale",
    }
    twin = copy.deepcopy(adapter).eval()
    x = torch.randn(2, 5, H)
    assert torch.equal(twin(x), adapter.eval()(x))
    half = BottleneckAdapter(H, R, dropout=0.1, dtype=torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 4), {}, ValueError, "hidden_size: expected at least 1, got 0"),
        ((4, 0), {}, ValueError, "bottleneck_size: expected at least 1, got 0"),
        ((4, 2, "softmax"), {}, ValueError, "activation: expected one of silu, .*got 'softmax'"),
        ((4, 2, 3), {}, TypeError, "activation: expected a name or a callable, got int"),
        ((4, 2), {"output_activation": "x"}, ValueError, "output_activation: expected one of"),
        ((4, 2), {"scaling": "rows"}, ValueError, "scaling: expected a number, scalar or channels"),
        ((4, 2), {"scaling": None}, TypeError, "scaling: expected a number or a name"),
        ((4, 2), {"dropout": 1.0}, ValueError, "dropout_p: expected a probability"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BottleneckAdapter(*arguments, **options)

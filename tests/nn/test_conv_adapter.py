"""ConvAdapter against its formula in plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fasttune.nn import ConvAdapter

C, R, K = 12, 4, 3


def filled(out_channels: int = C, **options: Any) -> ConvAdapter:
    torch.manual_seed(0)
    adapter = ConvAdapter(C, out_channels, R, **options).double()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)
    return adapter


def formula(adapter: ConvAdapter, x: Tensor, stride: int, padding: int) -> Tensor:
    """Every bottleneck channel sees its own C / R channels: windows and sums, no convolution."""
    n, _, height, width = x.shape
    windows = functional.unfold(x, K, padding=padding, stride=stride)
    windows = windows.view(n, R, C // R * K * K, -1)
    down = torch.einsum("nrkl,rk->nrl", windows, adapter.down.weight.view(R, -1))
    z = (down + adapter.down.bias.view(1, R, 1)).relu()
    u = torch.einsum("nrl,or->nol", z, adapter.up.weight.view(-1, R))
    u = u + adapter.up.bias.view(1, -1, 1)
    scale = adapter.scaling if adapter.scale is None else adapter.scale.view(1, -1, 1)
    rows = (height + 2 * padding - K) // stride + 1
    return (u * scale).view(n, -1, rows, (width + 2 * padding - K) // stride + 1)


@pytest.mark.parametrize("scaling", [0.5, "scalar", "channels"])
def test_it_computes_its_formula(scaling: float | str) -> None:
    adapter, x = filled(scaling=scaling), torch.randn(2, C, 5, 7).double()
    torch.testing.assert_close(adapter(x), x + formula(adapter, x, 1, 1))


def test_beside_a_convolution_it_has_its_shape_and_gradients() -> None:
    adapter = filled(10, stride=2, padding=0)
    x = torch.randn(2, C, 9, 7).double().requires_grad_()
    residual = torch.randn(2, 10, 4, 3).double()
    torch.testing.assert_close(adapter(x, residual), residual + formula(adapter, x, 2, 0))
    wanted = [x, *adapter.parameters()]
    weight = torch.randn(2, 10, 4, 3).double()
    ours = torch.autograd.grad((adapter(x, residual) * weight).sum(), wanted)
    theirs = torch.autograd.grad((formula(adapter, x, 2, 0) * weight).sum(), wanted)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_fresh_adapter_is_the_identity_and_dropout_acts_in_training() -> None:
    x = torch.randn(2, C, 5, 7)
    assert torch.equal(ConvAdapter(C, C, R, dropout=0.5)(x), x)
    adapter = filled(dropout=0.5).float()
    added = adapter(x) - x
    dropped = (added.abs() < 1e-6).float().mean()
    assert 0.4 < dropped < 0.6
    assert torch.equal(adapter.eval()(x), filled().float()(x))
    assert torch.equal(copy.deepcopy(adapter)(x), adapter(x))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 4, 2), {}, ValueError, "in_channels: expected at least 1, got 0"),
        ((8, 4, 3), {}, ValueError, "bottleneck_size: expected a divisor of 8, got 3"),
        ((8, 4, 2, "softplus"), {}, ValueError, "activation: expected one of"),
        ((8, 4, 2), {"scaling": "channel"}, ValueError, "scaling: expected a number"),
        ((8, 4, 2), {"scaling": None}, TypeError, "scaling: expected a number or a name"),
        ((8, 4, 2), {"dropout": 1.0}, ValueError, "dropout"),
    ],
)
def test_bad_input_is_named(arguments: Any, options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ConvAdapter(*arguments, **options)


def test_parameters_have_the_documented_names_and_shapes() -> None:
    adapter: nn.Module = ConvAdapter(C, 10, R)
    assert {key: tuple(p.shape) for key, p in adapter.named_parameters()} == {
        "down.weight": (R, C // R, K, K), "down.bias": (R,), "up.weight": (10, R, 1, 1),
        "up.bias": (10,), "scale": (10,),
    }  # fmt: skip

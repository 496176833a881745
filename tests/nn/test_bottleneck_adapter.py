"""BottleneckAdapter against its formula in plain torch."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny_models import relative
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.utils.parametrize import register_parametrization

from fasttune import _native
from fasttune._registry import use_backend
from fasttune.nn import BottleneckAdapter
from fasttune.nn import bottleneck as bottleneck_module
from fasttune.ops import policy
from fasttune.ops.policy import bottleneck_not_faster, bottleneck_too_few
from fasttune.testing.accounting import count

H, R = 24, 6
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


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


@pytest.mark.parametrize(
    ("rows", "width", "adapter", "dtype", "fused"),
    [
        (256, 64, FP32, BF16, True),  # torch casts the parameters
        (256, 64, BF16, BF16, False),  # the host's time counts
        (8192, 64, BF16, BF16, True),
        (8192, 128, FP16, FP16, True),
        (8192, 129, BF16, BF16, False),  # the vendor's products are faster
        (8192, 64, FP32, FP32, False),
        (8192, 64, torch.float64, BF16, False),  # autocast leaves it alone
    ],
)
def test_what_is_fused_on_a_gpu(
    rows: int,
    width: int,
    adapter: torch.dtype,
    dtype: torch.dtype,
    fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FakeTensorMode():
        x = torch.empty(2, rows // 2, 4096, dtype=dtype, device="cuda")
        down = torch.empty(width, 4096, dtype=adapter, device="cuda")
        up = torch.empty(4096, width, dtype=adapter, device="cuda")
    monkeypatch.setattr(policy, "limits", policy.Limits())
    capability = SimpleNamespace(major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: capability)
    assert bottleneck_not_faster(x, down, up, dtype, 0.1, scaled=False) != fused
    with use_backend("triton"):
        assert not bottleneck_not_faster(x, down, up, dtype, 0.1, scaled=False)
    capability.major = 7
    assert bottleneck_not_faster(x, down, up, dtype, 0.1, scaled=False)


def test_where_tiles_take_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = policy.Limits(bottleneck_weights=100, bottleneck_rows=4)
    monkeypatch.setattr(policy, "limits", limits)
    down, up = torch.empty(8, 50), torch.empty(50, 8)
    slow = [
        bottleneck_not_faster(torch.empty(4, rows, 50), down, up, BF16, 0.0, scaled=False)
        for rows in (1, 16)
    ]
    assert slow == [True, not _native.has_base_product()]
    assert bottleneck_not_faster(torch.empty(64, 50), down, up, FP32, 0.0, scaled=False)
    for answer, tiles in ((False, True), (True, False), (True, True)):
        monkeypatch.setattr("fasttune._native.takes_bottleneck", lambda *_, own=answer: own)
        monkeypatch.setattr("fasttune._native.has_base_product", lambda own=tiles: own)
        for rows in (3, 4):  # 400 weights
            for dtype in (BF16, FP32):
                x = torch.empty(rows, 50)
                found = bottleneck_not_faster(x, down, up, dtype, 0.0, scaled=False)
                whole = answer and (tiles or dtype == BF16)  # taken in bf16: there are tiles
                assert found == (not whole or rows == 3)
                few = bottleneck_too_few(x.to(dtype), 0.0, scaled=False)
                assert few == (dtype == FP32 and rows == 3)
    monkeypatch.setattr(policy, "limits", dataclasses.replace(limits, bottleneck_fp32=150))
    for rows, weights in ((2, 8), (3, 8), (3, 4)):  # from 150 elements on, few rows will do
        x, width = torch.empty(rows, 50), torch.empty(weights, 50)
        found = bottleneck_not_faster(x, width, width.t(), FP32, 0.0, scaled=False)
        assert found == (rows == 2 or weights == 8)
        assert bottleneck_too_few(x, 0.0, scaled=False) == (rows == 2)
    x = torch.empty(2, 50)
    assert not bottleneck_too_few(x, 0.1, scaled=False)
    assert not bottleneck_too_few(x, 0.0, scaled=True)
    with torch.autocast("cpu", BF16):
        assert not bottleneck_too_few(x, 0.0, scaled=False)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"scaling": "channels"}])
def test_it_compiles_as_one_graph(options: dict[str, Any]) -> None:
    adapter = filled(**options).to(BF16).eval()
    x = torch.randn(70, H, dtype=BF16)
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    ours, plain = results(compiled, adapter, x), results(adapter, adapter, x)
    for name, value in plain.items():
        assert relative(ours[name], value) < 1e-2, name


@pytest.mark.parametrize("change", ["lora", "hook", "forward", "parametrization", "quantized"])
def test_what_is_put_around_its_layers_acts(change: str) -> None:
    """The op reads weights; a layer that is more than those must be called."""
    adapter, x = filled(dropout=0.5), torch.randn(5, H)
    plain = results(adapter, adapter, x)["y"]
    if change == "lora":
        config = LoraConfig(target_modules=["down", "up"], init_lora_weights=False)
        inject_adapter_in_model(config, adapter)
    elif change == "hook":
        adapter.up.register_forward_hook(lambda layer, args, y: 2 * y)
    elif change == "forward":  # as accelerate does
        adapter.up.forward = lambda h: 3 * nn.Linear.forward(adapter.up, h)  # type: ignore
    elif change == "parametrization":
        register_parametrization(adapter.down, "weight", nn.ReLU())
    else:
        adapter = torch.ao.quantization.quantize_dynamic(adapter.eval(), {nn.Linear})
    torch.manual_seed(0)
    found = adapter(x)
    torch.manual_seed(0)
    expected = x + functional.dropout(
        adapter.up(adapter.down(x).relu()), 0.5, training=adapter.training
    )
    assert torch.equal(found, expected) and not torch.equal(found, plain)


@pytest.mark.parametrize("autocast", [None, BF16])
def test_a_trained_scale_gives_the_same_dtype_fused_or_not(
    autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = filled(scaling="channels").to(FP32 if autocast else BF16)
    x = torch.randn(5, H, dtype=BF16)
    found = []
    for slow in (True, False):
        monkeypatch.setattr(bottleneck_module, "bottleneck_not_faster", lambda *_, slow=slow: slow)
        with torch.autocast("cpu", BF16, enabled=autocast is not None):
            found.append(adapter(x))
    assert found[0].dtype == found[1].dtype == BF16
    assert relative(found[1], found[0]) < 1e-2

"""What is special of bottleneck; tests/test_conformance.py has the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fasttune import _native
from fasttune.ops import bottleneck
from fasttune.ops.bottleneck import BACKWARD, FORWARD
from fasttune.testing.conformance import backend
from fasttune.testing.numerics import check


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "x": torch.randn(3, 5, 24),
        "down": torch.randn(6, 24),
        "up": torch.randn(24, 6),
        "down_bias": torch.randn(6),
        "up_bias": torch.randn(24),
        "scale": torch.randn(24),
    }


def call(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {**tensors(), **changes}
    x, down, up = (arguments.pop(name) for name in ("x", "down", "up"))
    return bottleneck(x, down, up, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_the_same_in_every_backend(dtype: torch.dtype) -> None:
    seed = torch.tensor(123456789012345)
    given = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    outputs = []
    for name in ("reference", "cpu", "triton"):
        with backend(name):
            outputs.append(call(**given, dropout_p=0.5, seed=seed) == 0)
    assert 0.4 < outputs[0].float().mean() < 0.6
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("wanted", [None, "x", "residual", "down", "up", "down_bias", "up_bias"])
@pytest.mark.parametrize("activation", ["gelu", "identity"])
def test_a_whole_adapter_in_fp32_is_as_exact_as_its_products(
    wanted: str | None, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    shapes = {
        "x": (70, 45), "down": (32, 45), "up": (77, 32), "down_bias": (32,), "up_bias": (77,),
        "residual": (70, 77), "scale": (77,),
    }  # fmt: skip
    given = {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    if wanted is None:
        del given["residual"]
    dy = torch.randn(70, 77)

    def results(dtype: torch.dtype) -> dict[str, Tensor]:
        own = {
            name: t.to(dtype).requires_grad_(wanted in (None, name)) for name, t in given.items()
        }
        y = call(**own, activation=activation)
        y.backward(dy.to(dtype))
        grads = {name: t.grad for name, t in own.items() if t.grad is not None}
        return {"y": y.detach(), **grads}

    assert _native.takes_bottleneck(given["x"], given["down"], given["up"], torch.float32, None, 0)
    ours, exact = results(torch.float32), results(torch.float64)
    monkeypatch.setattr(_native, "takes_bottleneck", lambda *_: False)
    theirs = results(torch.float32)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)  # two ways, not one
    for name, truth in exact.items():
        check(name, ours[name], theirs[name], truth)


def test_which_adapters_are_computed_whole_in_fp32() -> None:
    fp32, bf16 = torch.float32, torch.bfloat16
    x, down, up = torch.randn(3, 20), torch.randn(16, 20), torch.randn(24, 16)
    takes = _native.takes_bottleneck
    assert takes(x, down, up, fp32, torch.randn(3, 24), 0)
    assert not takes(x, down, up, fp32, None, 6554)  # dropout
    assert not takes(x, down, up, fp32, torch.randn(3, 24).to(bf16), 0)
    assert not takes(x.to(bf16), down, up, fp32, None, 0)
    assert not takes(x, torch.randn(17, 20), torch.randn(24, 17), fp32, None, 0)
    few = torch.randn(64, 20), torch.randn(24, 64)  # rows, for tiles
    assert not takes(x, *few, fp32, None, 0)
    assert not takes(x, down, torch.randn(0, 16), fp32, None, 0)


def test_the_residual_may_be_x_or_its_copy() -> None:
    given = tensors()
    x = given["x"].requires_grad_()
    grads = []
    for residual in (x, x.clone()):
        x.grad = None
        call(x=x, residual=residual, dropout_p=0.0).square().sum().backward()
        grads.append(x.grad)
    assert torch.allclose(grads[0], grads[1], rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


def test_vmap_and_second_derivatives() -> None:
    given = tensors()
    del given["x"], given["scale"]
    down, up = given.pop("down"), given.pop("up")
    x = torch.randn(3, 5, 24)
    mapped = torch.func.vmap(lambda row: bottleneck(row, down, up, residual=row, **given))(x)
    assert torch.allclose(mapped, bottleneck(x, down, up, residual=x, **given), atol=1e-5)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(
        bottleneck(x, down, up, **given).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(3, dtype=torch.int64)}, TypeError, "x: expected fp32"),
        ({"x": 3}, TypeError, "x: expected a tensor, got int"),
        ({"down": torch.randn(6, 23)}, ValueError, r"down: expected shape \[any, 24\]"),
        ({"up": torch.randn(24, 5)}, ValueError, r"up: expected shape \[any, 6\]"),
        ({"down_bias": torch.randn(5)}, ValueError, r"down_bias: expected shape \[6\]"),
        ({"up_bias": torch.randn(5)}, ValueError, r"up_bias: expected shape \[24\]"),
        ({"residual": torch.randn(3, 5, 23)}, ValueError, r"residual: expected shape \[3, 5, 24\]"),
        ({"activation": "swish"}, ValueError, "activation: expected one of silu"),
        ({"scale": torch.randn(7)}, ValueError, r"scale: expected shape \[24\], got \[7\]"),
        ({"scale": "2"}, TypeError, "scale: expected a number or a tensor, got str"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p: expected a probability"),
    ],
)
def test_wrong_arguments_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_registered_ops_pass_opcheck(name: str, dtype: torch.dtype) -> None:
    given = tensors()
    x, scale = given.pop("x").view(15, 24).to(torch.bfloat16), given.pop("scale")
    down, down_bias, up, up_bias = (
        given[key].to(dtype) for key in ("down", "down_bias", "up", "up_bias")
    )
    weights = (down, down_bias, up, up_bias, scale)
    facts = (0.5, "gelu", 6554, torch.tensor(3), dtype)
    checks = ("test_schema", "test_faketensor")
    with backend(name):
        args = (x, x.clone(), *weights, *facts, dtype)
        opcheck(FORWARD.registered, args, test_utils=checks)
        y, z = FORWARD.registered(*args)
        for needs in ([True] * 6, [False, True, False, False, True, True], [True] + [False] * 5):
            back = (torch.randn_like(y), x, z, *weights, *facts, False, needs)
            opcheck(BACKWARD.registered, back, test_utils=checks)
            found = BACKWARD.registered(*back)
            assert len(found) == sum(needs)

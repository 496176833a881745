"""The activations of every backend on a dense grid, at the edges of fp32, and in their list."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fasttune import _native
from fasttune.ops import bias_activation, glu
from fasttune.ops._activations import ACTIVATIONS, check_activation
from fasttune.testing.conformance import backend

BUILDS = [f"cpu:{isa}" for isa in _native.cpu().isa_available().split(",")]
BACKENDS = pytest.mark.parametrize("name", ["reference", *BUILDS, "triton"])
EACH = pytest.mark.parametrize("activation", list(ACTIVATIONS))
UNIT = 2.0**-24  # half a unit in the last place of fp32, relative


def value_and_slope(x: Tensor, activation: str, name: str) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    with backend(name):
        y = bias_activation(x, activation=activation)
        (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), slope


def grid() -> Tensor:
    tiny = torch.logspace(-37, 0, 3000)
    return torch.cat([torch.linspace(-20, 20, 40001), tiny, -tiny])


def logistic(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


# In fp64 with the tails kept: (value, slope).
TRUTH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * logistic(x),
    "gelu": lambda x: 0.5 * x * torch.special.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: x * logistic(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "quick_gelu": lambda x: x * logistic(1.702 * x),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0).square(),
    "tanh": torch.tanh,
    "sigmoid": logistic,
    "leaky_relu": lambda x: torch.where(x <= 0, 0.01 * x, x),
}


def exponent(x: Tensor, activation: str) -> Tensor:
    """Size of the argument of the exponential that makes the tail of the value."""
    if activation == "gelu":
        return x.square() / 2
    if activation == "gelu_tanh":
        return 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3).abs()
    return 1.702 * x.abs()


@BACKENDS
@EACH
def test_dense_grid_against_fp64(activation: str, name: str) -> None:
    """Relative error of the value, far tails included; absolute error of the slope.

    An argument E of an exponential carries two or three roundings, an error of 3 E units; the rest
    is at most 8 roundings. Only torch's own erf and tanh (the reference backend) cancel in the
    tails: there the bound is absolute. Slopes are at most 1.13, or 2 x of relu2.
    """
    x = grid()
    exact = x.double().requires_grad_()
    truth = TRUTH[activation](exact)
    (truth_slope,) = torch.autograd.grad(truth.sum(), exact)
    truth = truth.detach()
    value, slope = value_and_slope(x, activation, name)
    normal = truth.abs() > 2.0**-120  # below, exp is allowed to flush to zero
    relative = ((value.double() - truth) / truth)[normal & (truth != 0)].abs()
    bound = (8 + 3 * exponent(x.double(), activation))[normal & (truth != 0)] * UNIT
    if name == "reference" and activation in ("gelu", "gelu_tanh"):
        assert ((value.double() - truth).abs() <= 8 * UNIT * x.abs()).all()
    else:
        assert (relative <= bound).all(), float((relative / bound).max())
    assert (value[~normal].abs() <= 2.0**-119).all()
    size = 2 * x.abs().clamp(min=1) if activation == "relu2" else 1.0
    assert ((slope.double() - truth_slope).abs() <= 10 * UNIT * size).all()


@pytest.mark.parametrize("name", BUILDS)
def test_a_sigmoid_is_accurate_far_from_zero(name: str) -> None:
    """An exponential of 2 units in the last place, a sum and a quotient, however large x is."""
    x = torch.linspace(-87, 87, 100_001)
    value, _ = value_and_slope(x, "sigmoid", name)
    truth = torch.sigmoid(x.double())
    assert ((value.double() - truth) / truth).abs().max() <= 3 * 2 * UNIT


# Where exponentials overflow, underflow and squares and cubes overflow. (Above 1.7e38 torch's own
# gelu overflows.)
EDGES = [0.0, -0.0, 1e-45, 1e-38, 16.0, 16.5, 50.0, 87.4, 88.8, 104.0, 1e4, 1e13, 1e19, 1e38]


@BACKENDS
@EACH
def test_finite_arguments_never_give_nan(activation: str, name: str) -> None:
    edges = torch.tensor(EDGES)
    x = torch.cat([edges, -edges]).repeat(2)
    value, slope = value_and_slope(x, activation, name)
    assert not value.isnan().any() and not slope.isnan().any()
    truth = TRUTH[activation](x.double()).float()  # infinite where the square of relu2 is
    assert torch.allclose(value, truth, rtol=1e-4, atol=1e-35)
    far = x.abs() > 100
    left = 0.01 if activation == "leaky_relu" else 0.0
    assert ((slope[far & (x < 0)] - left).abs() <= 1e-35).all()
    if activation not in ("relu2",):
        limit = 0.0 if activation in ("tanh", "sigmoid") else 1.0
        assert (slope[far & (x > 0)] == limit).all()


@BACKENDS
@EACH
def test_nan_stays_nan_and_infinities_are_as_in_torch(activation: str, name: str) -> None:
    x = torch.full((37,), 0.5)  # a tail of five, and whole vectors
    x[[3, 35]] = float("nan")
    x[[4, 36]] = float("inf")
    x[[5, 34]] = -float("inf")
    value, slope = value_and_slope(x, activation, name)
    assert value[[3, 35]].isnan().all()
    stock = ACTIVATIONS[activation].value(x)
    torch.testing.assert_close(value, stock, equal_nan=True)
    others = torch.tensor([i for i in range(37) if i not in (3, 4, 5, 34, 35, 36)])
    assert not value[others].isnan().any() and not slope[others].isnan().any()
    assert torch.equal(value[others], value[others][:1].expand(31))


@BACKENDS
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_the_slope_at_zero_is_zero(activation: str, name: str) -> None:
    _, slope = value_and_slope(torch.tensor([0.0, -0.0]), activation, name)
    assert slope.tolist() == [0.0, 0.0]


@BACKENDS
def test_nan_in_one_operand_of_glu_stays_there(name: str) -> None:
    gate, up = torch.randn(2, 40), torch.randn(2, 40)
    gate[0, 3] = up[1, 39] = float("nan")
    with backend(name):
        y = glu(gate, up, activation="silu")
    assert y.isnan().nonzero().tolist() == [[0, 3], [1, 39]]


@EACH
def test_slopes_in_fp64_are_the_derivatives(activation: str) -> None:
    x = torch.linspace(-7, 7, 1001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(ACTIVATIONS[activation].value(x).sum(), x)
    torch.testing.assert_close(ACTIVATIONS[activation].slope(x.detach()), slope)


def test_every_tier_has_the_same_list() -> None:
    assert list(_native.cpu().ACTIVATIONS) == list(ACTIVATIONS)
    with pytest.raises(TypeError, match="activation: expected a name, got NoneType"):
        check_activation(None)
    with pytest.raises(ValueError, match=r"expected one of silu, gelu, .*, got 'gelu_new'"):
        check_activation("gelu_new")

"""The activations by name: their formulas in torch, which the kernels of every backend follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CUBIC = 0.044715
_ROOT_TWO_OVER_PI = math.sqrt(2 / math.pi)
_QUICK = 1.702


@dataclass(frozen=True)
class Activation:
    """The value of an activation and its slope, both elementwise in the dtype of the argument."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s + x * s * torch.sigmoid(-x)


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(-x * math.sqrt(0.5)) + x * density


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    x = x.clamp(-16, 16)  # beyond, the slope is 0 or 1; the cubic must not overflow
    z = 2 * _ROOT_TWO_OVER_PI * (x + _CUBIC * x**3)
    s, inner = torch.sigmoid(z), 2 * _ROOT_TWO_OVER_PI * (1 + 3 * _CUBIC * x.square())
    return s + x * s * torch.sigmoid(-z) * inner


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(_QUICK * x)


def _quick_gelu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(_QUICK * x)
    return s + _QUICK * (x * s * torch.sigmoid(-_QUICK * x))


def _sigmoid_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


# Semantics of torch.nn.functional; quick_gelu and relu2 of transformers.activations (5.24):
# QuickGELUActivation and ReLUSquaredActivation. The slopes of relu and relu2 at 0 are 0,
# that of leaky_relu is 0.01.
ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(functional.silu, _silu_slope),
    "gelu": Activation(functional.gelu, _gelu_slope),
    "gelu_tanh": Activation(
        lambda x: functional.gelu(x, approximate="tanh"),
        _gelu_tanh_slope,
    ),
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_slope),
    "relu": Activation(functional.relu, lambda x: torch.where(x <= 0, 0.0, 1.0).to(x.dtype)),
    "relu2": Activation(
        lambda x: functional.relu(x).square(),
        lambda x: 2 * functional.relu(x),
    ),
    "tanh": Activation(torch.tanh, lambda x: 1 - torch.tanh(x).square()),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_slope),
    "leaky_relu": Activation(
        functional.leaky_relu,  # 0.01 x below 0
        lambda x: torch.where(x <= 0, 0.01, torch.ones_like(x)),
    ),
}


def check_activation(activation: Any) -> None:
    """Raises TypeError or ValueError unless ``activation`` names one."""
    if not isinstance(activation, str):
        raise TypeError(f"activation: expected a name, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: expected one of {names}, got {activation!r}")

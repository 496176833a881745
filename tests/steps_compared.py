"""A training step of a whole model, and the bar that a patched one has to meet.

The bar is the project's rule, over norms of whole gradients: |ours - truth| <= FACTOR |stock -
truth| + a few roundings, where truth is the stock model in fp64.
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from tiny_models import gradients
from torch import Tensor, nn

# Norms of many errors vary less than their maxima, but a chain of layers multiplies what differs.
FACTOR = 3.0
# All gradients together: the sum of many independent errors hardly varies.
TOTAL_FACTOR = 2.0
# A gradient that stock itself gets wrong by this much is what cancellation left of larger terms: it
# only has to be of the same size.
NOISE = 0.05
ROUNDINGS = 8


def loss_of(output: Any) -> Tensor:
    loss: Tensor = output.loss
    return loss


def step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and every gradient."""
    torch.manual_seed(0)
    loss = loss_of(model(**batch))
    loss.backward()
    result = {"loss": loss.detach(), **gradients(model)}
    model.zero_grad(set_to_none=True)
    return result


def assert_close(
    ours: dict[str, Tensor],
    stock: dict[str, Tensor],
    truth: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    assert ours.keys() == stock.keys()
    # A gradient that is zero but for noise (keys' biases under softmax) has no relative error.
    scale = max(float(t.norm()) for name, t in truth.items() if name != "loss")
    errors = {n: float((stock[n].double() - t).norm()) for n, t in truth.items()}
    # One gradient of stock may be near the truth by luck: it counts as at least the median.
    typical = statistics.median(
        errors[n] / float(t.norm()) for n, t in truth.items() if float(t.norm()) > 1e-3 * scale
    )
    total = {"ours": 0.0, "stock": 0.0}
    for name, exact in truth.items():
        size = float(exact.norm())
        error = float((ours[name].double() - exact).norm())
        allowed = FACTOR * max(errors[name], typical * size)
        allowed += ROUNDINGS * torch.finfo(torch.float32).eps * (size + 1e-3 * scale)
        if name == "loss":  # one number: stock's error may be small by luck
            allowed += torch.finfo(dtype).eps / 2 * size
        elif errors[name] > NOISE * size:
            allowed += size
        assert error <= allowed, f"{name}: {error:.2e}, stock {errors[name]:.2e}"
        if name != "loss":
            total["ours"] += error**2
            total["stock"] += errors[name] ** 2
    floor = ROUNDINGS * torch.finfo(torch.float32).eps * scale
    assert total["ours"] ** 0.5 <= TOTAL_FACTOR * total["stock"] ** 0.5 + floor


def exact_copy(model: Any) -> nn.Module:
    twin = copy.deepcopy(model).double()
    if hasattr(twin, "set_experts_implementation"):  # grouped_mm takes no fp64
        twin.set_experts_implementation("eager")
    return twin


def in_double(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in batch.items()
    }

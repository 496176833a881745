"""fasttune.nn.LinearCrossEntropyLoss against a head and torch's own loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasttune.nn import LinearCrossEntropyLoss


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_equals_a_head_and_torchs_loss(reduction: str, smoothing: float) -> None:
    head = nn.Linear(24, 301)
    hidden = torch.randn(4, 9, 24, requires_grad=True)
    targets = torch.randint(0, 301, (4, 9))
    targets[0, :4] = -100
    loss = LinearCrossEntropyLoss(reduction=reduction, label_smoothing=smoothing)
    stock = nn.CrossEntropyLoss(reduction=reduction, label_smoothing=smoothing)
    leaves = [hidden, head.weight, head.bias]
    ours = loss(hidden, head.weight, targets, head.bias)
    theirs = stock(head(hidden).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_statistics_come_with_the_loss() -> None:
    weight, hidden = torch.randn(50, 8), torch.randn(6, 8)
    targets = (hidden @ weight.t()).argmax(-1)
    value, stats = LinearCrossEntropyLoss(return_stats=True)(hidden, weight, targets)
    assert float(stats.accuracy) == 1.0 and int(stats.tokens) == 6
    assert value.dim() == 0 and list(LinearCrossEntropyLoss().state_dict()) == []


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction: expected"):
        LinearCrossEntropyLoss(reduction="none")

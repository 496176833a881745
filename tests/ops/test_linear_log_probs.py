"""What is special of linear_log_probs; tests/test_conformance.py has the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fasttune.ops import _chunked_head, linear_cross_entropy, linear_log_probs
from fasttune.testing import accounting

BF16 = torch.bfloat16


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(150, 24, requires_grad=True), torch.randn(301, 24)
    targets = torch.randint(0, 301, (150,))
    targets[::7] = -100
    return hidden, weight.requires_grad_(), targets


def test_several_chunks_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = tensors()
    dy, found = torch.randn(150), []
    for budget in (1 << 30, 1):  # one chunk, and chunks of 64 rows
        monkeypatch.setitem(_chunked_head._LOGITS_BYTES, "cpu", budget)
        y = linear_log_probs(hidden, weight, targets)
        found.append([y.detach(), *torch.autograd.grad(y, [hidden, weight], dy)])
    assert _chunked_head.chunk_rows(150, 24, 301, 4, "cpu") == 64
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_their_sum_is_the_loss() -> None:
    hidden, weight, targets = tensors()
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum")
    assert isinstance(loss, Tensor)
    ours = -linear_log_probs(hidden, weight, targets).sum()
    torch.testing.assert_close(ours, loss)
    for a, b in zip(
        torch.autograd.grad(ours, [hidden, weight]),
        torch.autograd.grad(loss, [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_nothing_of_the_size_of_the_logits_is_kept() -> None:
    """Counted at 8 choices x 128 tokens of Llama 3's vocabulary."""
    hidden = torch.empty(1024, 4096, dtype=BF16, device="meta", requires_grad=True)
    weight = torch.empty(128_256, 4096, dtype=BF16, device="meta")
    targets = torch.empty(1024, dtype=torch.int64, device="meta")

    def stock(hidden: Tensor) -> Tensor:
        logits = (hidden @ weight.t()).float()
        return torch.log_softmax(logits, -1).gather(-1, targets[:, None])

    ours = accounting.count(lambda h: linear_log_probs(h, weight, targets), hidden)
    theirs = accounting.count(stock, hidden)
    assert ours.total.opaque.calls == 0
    assert ours.saved_bytes == hidden.nbytes
    assert theirs.saved_bytes > weight.nbytes + 1024 * 128_256 * 4
    assert sum(launch.gemm for launch in ours.total.launches) == 2
    weight.requires_grad_()
    trained = accounting.count(lambda h, w: linear_log_probs(h, w, targets), hidden, weight)
    assert trained.saved_bytes == targets.nbytes  # the others are arguments
    assert sum(launch.gemm for launch in trained.total.launches) == 4  # the logits twice


def test_a_frozen_head_gives_the_gradient_of_a_trained_one() -> None:
    hidden, weight, targets = tensors()
    dy = torch.randn(150)
    gradients = [
        torch.autograd.grad(linear_log_probs(hidden, w, targets), hidden, dy)[0]
        for w in (weight, weight.detach())
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_vmap_and_second_derivatives() -> None:
    hidden, weight, targets = tensors()
    mapped = torch.func.vmap(lambda h, t: linear_log_probs(h[None], weight, t[None])[0])
    with pytest.raises(RuntimeError, match="vmap"):  # targets are checked by value
        mapped(hidden, targets)
    rows = torch.func.vmap(lambda w: linear_log_probs(hidden, w, targets))(weight[None])
    torch.testing.assert_close(rows[0], linear_log_probs(hidden, weight, targets))
    y = linear_log_probs(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(y.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": 3}, TypeError, "hidden: expected a tensor, got int"),
        ({"weight": torch.randn(301, 23)}, ValueError, r"weight: expected shape \[any, 24\]"),
        ({"weight": torch.randn(301, 24).to(BF16)}, TypeError, "weight: expected hidden's dtype"),
        ({"targets": torch.zeros(149).long()}, ValueError, r"targets: expected shape \[150\]"),
        ({"targets": torch.full((150,), 301)}, ValueError, r"\[0, 301\) .* got 301"),
        ({"bias": torch.randn(300)}, ValueError, r"bias: expected shape \[301\]"),
        ({"softcap": -1.0}, ValueError, "softcap: expected 0"),
    ],
)
def test_wrong_arguments_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    hidden, weight, targets = tensors()
    given = {"hidden": hidden, "weight": weight, "targets": targets, **changes}
    with pytest.raises(error, match=message):
        linear_log_probs(**given)

"""fasttune.nn.MultipleChoiceLoss against the formulas of the paper, choice by choice."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttune.nn import MultipleChoiceLoss
from fasttune.testing import numerics

EXAMPLES, CHOICES, TOKENS, WIDTH, VOCABULARY = 3, 4, 6, 16, 53
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64


def tensors(dtype: torch.dtype = FP32) -> dict[str, Tensor]:
    """Choices of 1 to 6 tokens; the last example has two choices."""
    generator = torch.Generator().manual_seed(3)
    shape = (EXAMPLES, CHOICES, TOKENS)
    targets = torch.randint(0, VOCABULARY, shape, generator=generator)
    lengths = torch.randint(1, TOKENS + 1, shape[:2], generator=generator)
    targets[torch.arange(TOKENS) >= lengths[..., None]] = -100
    targets[2, 2:] = -100

    def random(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_()

    return {
        "hidden": random(*shape, WIDTH, scale=1.0),
        "weight": random(VOCABULARY, WIDTH, scale=1.5 * WIDTH**-0.5),
        "bias": random(VOCABULARY, scale=0.5),
        "targets": targets,
        "correct": torch.tensor([2, 0, 1]),
    }


def one_example(probabilities: list[Tensor], correct: int) -> Tensor:
    """L_LM + L_UL + L_LN of the probabilities [T_c] of the tokens of each choice."""
    beta = [p.log().sum() / len(p) for p in probabilities]
    wrong = [p for c, p in enumerate(probabilities) if c != correct]
    language = -beta[correct]
    unlikelihood = -sum((1 - p).log().sum() for p in wrong) / sum(len(p) for p in wrong)
    total = sum(b.exp() for b in beta)
    return language + unlikelihood - (beta[correct].exp() / total).log()


def paper(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, correct: Tensor) -> Tensor:
    losses = []
    for example in range(len(targets)):
        probabilities = []
        for choice in range(targets.shape[1]):
            rows = targets[example, choice] != -100
            if rows.any():
                logits = hidden[example, choice, rows] @ weight.t() + bias
                labels = targets[example, choice, rows]
                probabilities.append(logits.softmax(-1)[torch.arange(len(labels)), labels])
        losses.append(one_example(probabilities, int(correct[example])))
    return torch.stack(losses).mean()


def results(function: Any, given: dict[str, Tensor]) -> list[Tensor]:
    leaves = [given["hidden"], given["weight"], given["bias"]]
    loss = function(*leaves, given["targets"], given["correct"])
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def ours(hidden: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
    loss: Tensor = MultipleChoiceLoss()(hidden, weight, *rest, bias)
    return loss


def in_dtype(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t
        for name, t in given.items()
    }


def test_it_is_the_paper_s_in_fp64() -> None:
    given = tensors(FP64)
    for mine, exact in zip(results(ours, given), results(paper, given), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_it_is_as_exact_as_torch(dtype: torch.dtype) -> None:
    given = tensors(dtype)
    exact = results(paper, in_dtype(given, FP64))
    stock = results(paper_in_low_precision, given)
    names = ("loss", "hidden", "weight", "bias")
    for name, mine, theirs, truth in zip(names, results(ours, given), stock, exact, strict=True):
        # The loss is one number, torch's error of which may be small by luck: 2^-8 of the largest
        # logit (about 5) is one rounding of a logit in bf16.
        floor = 5 * torch.finfo(dtype).eps if name == "loss" else 0.0
        numerics.check(name, mine, theirs, truth, floor)


def paper_in_low_precision(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, correct: Tensor
) -> Tensor:
    """With logits in the dtype of the model, upcast as transformers does."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    eye = torch.eye(VOCABULARY)
    return paper(logits, eye, torch.zeros(VOCABULARY), targets, correct)


def test_under_autocast_and_with_a_frozen_head() -> None:
    given = tensors()
    exact = results(paper, in_dtype(given, FP64))
    frozen = {**given, "weight": given["weight"].detach(), "bias": given["bias"].detach()}
    with torch.autocast("cpu", dtype=BF16):
        loss = MultipleChoiceLoss()(
            frozen["hidden"], frozen["weight"], given["targets"], given["correct"], frozen["bias"]
        )
    (gradient,) = torch.autograd.grad(loss, frozen["hidden"])
    assert loss.dtype == FP32
    assert abs(float(loss) - float(exact[0])) < 0.02
    assert float((gradient - exact[1]).norm() / exact[1].norm()) < 0.02


def test_scale_and_softcap_are_those_of_the_logits() -> None:
    given = tensors(FP64)
    hidden, weight = given["hidden"], given["weight"]
    loss = MultipleChoiceLoss(logit_scale=0.25)(hidden, weight, given["targets"], given["correct"])
    zeros = torch.zeros(VOCABULARY, dtype=FP64)
    expected = paper(0.25 * hidden, weight, zeros, given["targets"], given["correct"])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_ignored_tokens_get_no_gradient_and_one_example_needs_no_batch() -> None:
    given = tensors()
    (gradient,) = torch.autograd.grad(
        MultipleChoiceLoss()(given["hidden"], given["weight"], given["targets"], given["correct"]),
        given["hidden"],
    )
    ignored = given["targets"] == -100
    assert not gradient[ignored].any() and bool(gradient[~ignored].any(-1).all())
    losses = [
        MultipleChoiceLoss()(
            given["hidden"][i], given["weight"], given["targets"][i], given["correct"][i]
        )
        for i in range(EXAMPLES)
    ]
    whole = MultipleChoiceLoss()(
        given["hidden"], given["weight"], given["targets"], given["correct"]
    )
    torch.testing.assert_close(torch.stack(losses).mean(), whole)


def test_a_wrong_token_of_probability_one_stays_finite() -> None:
    weight = torch.eye(5) * 100
    targets = torch.tensor([[[0, 1], [2, 3]]])
    hidden = torch.eye(5)[targets].requires_grad_()
    loss = MultipleChoiceLoss()(hidden, weight, targets, torch.tensor([0]))
    assert float(loss) == pytest.approx(24 * math.log(2) + math.log(2), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert bool(gradient.isfinite().all())


def test_the_logits_are_never_held() -> None:
    """Between forward and backward only hidden states, the head and a number a token are kept."""
    given, kept = tensors(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        results(ours, given)
    assert kept and max(t.numel() for t in kept) <= max(
        given["hidden"].numel(), given["weight"].numel()
    )
    assert all(t.shape[-1:] != (VOCABULARY,) or t.dim() == 1 for t in kept)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"correct": torch.tensor([2, 0, 4])}, ValueError, r"choice in \[0, 4\) .* got 4"),
        ({"correct": torch.tensor([2, 0, 3])}, ValueError, "that has tokens, got 3"),
        ({"correct": torch.tensor([2, 0])}, ValueError, r"correct: expected shape \[3\]"),
        ({"correct": torch.tensor([2.0, 0, 1])}, TypeError, "correct: expected an int64 tensor"),
        ({"correct": 2}, TypeError, "correct: expected an int64 tensor, got int"),
        ({"targets": torch.zeros(3, 4, 5).long()}, ValueError, "targets: expected shape"),
        ({"weight": torch.randn(VOCABULARY, 17)}, ValueError, r"weight: expected shape"),
        ({"bias": torch.randn(5)}, ValueError, "bias: expected shape"),
    ],
)
def test_wrong_arguments_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {**tensors(), **changes}
    with pytest.raises(error, match=message):
        MultipleChoiceLoss()(
            given["hidden"], given["weight"], given["targets"], given["correct"], given["bias"]
        )
    with pytest.raises(ValueError, match="softcap"):
        MultipleChoiceLoss(softcap=-1.0)

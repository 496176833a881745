"""The language model's head and its loss, frozen head, forward and backward to the hidden state.

Stock is what transformers does: logits in the model's dtype, a copy in fp32, cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from families import LLAMA3, QWEN2, SMOLLM2, Family
from torch import Tensor

from fasttune.ops import linear_cross_entropy

DTYPE = torch.bfloat16
HEAD_SCALE = 0.02  # of an initialised head: logits of about unit size
CASES = [
    pytest.param(family, tokens, id=f"{family.name}-{tokens}x{family.hidden}x{family.vocabulary}")
    for family, tokens in ((SMOLLM2, 1024), (LLAMA3, 128), (QWEN2, 128))
]


def stock_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def operands(family: Family, tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [M, H] with gradient, weight [V, H] frozen, targets [M]."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, family.hidden, dtype=DTYPE, device=device, requires_grad=True)
    weight = torch.empty(family.vocabulary, family.hidden, dtype=DTYPE, device=device)
    torch.nn.init.normal_(weight, std=HEAD_SCALE)
    return hidden, weight, torch.randint(family.vocabulary, (tokens,), device=device)


def make_step(
    loss_function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor
) -> Callable[[], Tensor]:
    def step() -> Tensor:
        hidden.grad = None
        loss = loss_function(hidden, weight, targets)
        loss.backward()
        return loss.detach()

    return step


def step_result(
    loss_function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    loss = make_step(loss_function, hidden, weight, targets)()
    return {"loss": loss, "dhidden": hidden.grad}


def build_step(family: Family, tokens: int, device: str, patched: bool) -> Callable[[], Tensor]:
    """One variant alone, for a process of its own."""
    loss_function = linear_cross_entropy if patched else stock_loss
    return make_step(loss_function, *operands(family, tokens, device))


def facts(family: Family, tokens: int) -> dict[str, object]:
    return {"model": family.name, "shape": [tokens, family.hidden, family.vocabulary]}


@pytest.mark.parametrize(("family", "tokens"), CASES)
def test_linear_cross_entropy_time(paired, device: str, family: Family, tokens: int):
    hidden, weight, targets = operands(family, tokens, device)

    def check():
        truth = hidden.detach().float().requires_grad_()
        return (
            step_result(stock_loss, hidden, weight, targets),
            step_result(linear_cross_entropy, hidden, weight, targets),
            step_result(stock_loss, truth, weight.float(), targets),
        )

    paired(
        make_step(stock_loss, hidden, weight, targets),
        make_step(linear_cross_entropy, hidden, weight, targets),
        check=check,
        dtype=DTYPE,
        **facts(family, tokens),
    )


@pytest.mark.parametrize(("family", "tokens"), CASES)
def test_linear_cross_entropy_memory(compare_memory, device: str, family: Family, tokens: int):
    compare_memory(build_step, family, tokens, device, **facts(family, tokens))

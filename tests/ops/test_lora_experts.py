"""Products with LoRA on stacks of experts, against the updated weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttune import _torch
from fasttune.ops.lora_experts import LowRank, batched_product, expert_linear, grouped_product
from fasttune.testing.numerics import check

E, K, N = 4, 32, 24
OFFSETS = (5, 5, 12, 20)  # the second expert has no rows


def draw(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16().to(dtype).requires_grad_()


def stack(dtype: torch.dtype, ranks: Sequence[int], *lead: int) -> tuple[Tensor, list[LowRank]]:
    weight = draw(dtype, *lead, K, N)
    updates = [
        LowRank(draw(dtype, *lead, K, rank), draw(dtype, *lead, rank, N), 0.5 + rank / 4)
        for rank in ranks
    ]
    return weight, updates


def leaves(x: Tensor, weight: Tensor, updates: Sequence[LowRank]) -> list[Tensor]:
    return [x, weight, *(f for own in updates for f in (own.left, own.right))]


def results(y: Tensor, inputs: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def formed(weight: Tensor, updates: Sequence[LowRank]) -> Tensor:
    """As PEFT forms it: the sum of the updates is rounded to the dtype of the weight."""
    return weight + sum(own.product() for own in updates)


def doubled(x: Tensor, weight: Tensor, updates: Sequence[LowRank]) -> Any:
    def copy(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_()

    return copy(x), copy(weight), [own.map(copy) for own in updates]


def loop(x: Tensor, weight: Tensor) -> Tensor:
    starts = (0, *OFFSETS[:-1])
    rows = zip(starts, OFFSETS, weight, strict=True)
    return torch.cat([x[start:stop] @ own for start, stop, own in rows])


@pytest.mark.parametrize("ranks", [(8,), (1,), (3, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_rows_meet_the_updated_weight_of_their_expert(
    transposed: bool, dtype: torch.dtype, ranks: tuple[int, ...]
) -> None:
    offs = torch.tensor(OFFSETS, dtype=torch.int32)
    weight, updates = stack(dtype, ranks, E)
    x, dy = draw(dtype, 20, K), draw(dtype, 20, N).detach()
    theirs = leaves(x, weight, updates)

    def run(weight: Tensor, updates: Sequence[LowRank]) -> Tensor:
        if not transposed:
            return grouped_product(_torch.grouped_mm, x, weight, updates, offs)
        columns = weight.mT.contiguous().mT
        updates = [own.map(lambda f: f.mT.contiguous().mT) for own in updates]
        return grouped_product(_torch.grouped_mm, x, columns, updates, offs)

    ours = results(run(weight, updates), theirs, dy)
    stock = results(loop(x, formed(weight, updates)), theirs, dy)
    exact = doubled(x, weight, updates)
    truth = results(loop(exact[0], formed(*exact[1:])), leaves(*exact), dy.double())
    for index, value in enumerate(truth):
        # fp32 sums of up to 32 terms in another order; stock's own error may be small by luck.
        floor = torch.finfo(torch.float32).eps * K**0.5 * float(value.abs().max())
        check(f"tensor {index}", ours[index], stock[index], value, floor=floor)


def test_rows_after_the_last_offset_reach_no_gradient() -> None:
    offs = torch.tensor([3, 3, 6, 8], dtype=torch.int32)
    weight, updates = stack(torch.float32, (8,), E)
    x = draw(torch.float32, 12, K)
    y = grouped_product(_torch.grouped_mm, x, weight, updates, offs)
    dy = torch.randn(12, N)
    results_of_all = torch.autograd.grad(y, leaves(x, weight, updates)[1:], dy)
    short = x.detach()[:8].requires_grad_()
    y = grouped_product(_torch.grouped_mm, short, weight, updates, offs)
    for ours, expected in zip(
        results_of_all, torch.autograd.grad(y, leaves(x, weight, updates)[1:], dy[:8]), strict=True
    ):
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaling", [1.5, torch.tensor(1.5, dtype=torch.float64)], ids=str)
def test_batched_product_in_fp64(scaling: Any) -> None:
    x, weight = (
        torch.randn(3, *s, dtype=torch.float64, requires_grad=True) for s in ((2, 4), (4, 5))
    )
    left, right = (
        torch.randn(3, *s, dtype=torch.float64, requires_grad=True) for s in ((4, 2), (2, 5))
    )

    def run(x: Tensor, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return batched_product(x, weight, [LowRank(left, right, scaling)] * 2)

    assert torch.autograd.gradcheck(run, (x, weight, left, right))
    expected = x @ (weight + 3.0 * (left @ right))
    assert torch.allclose(run(x, weight, left, right), expected)


def test_one_expert_is_lora_linear() -> None:
    weight, updates = stack(torch.float32, (3, 5))
    x, bias = torch.randn(7, K), torch.randn(N)
    transposed = [own.mT for own in updates]
    y = expert_linear(x, weight.mT, transposed, bias)
    assert type(y.grad_fn)._forward_cls.__module__ == "fasttune.ops.lora_linear"
    expected = nn.functional.linear(x, formed(weight, updates).mT, bias)
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)

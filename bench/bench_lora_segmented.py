"""Eight adapters in one batch, forward and backward, against bare products and a loop.

"base" is x W^T and dy W alone, without any adapter, so that its ratio is at most 1. "products" is
what has to run: these, and of every adapter its six on its own rows, in the dtype of x. "loop" is
PEFT's mixed batch under autograd: the base product once, then for each adapter its rows gathered,
two products and a scattered addition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from families import LLAMA3, SMOLLM2, Family
from torch import Tensor
from torch.nn.functional import linear

from fasttune.ops import LoraBranch, lora_segmented

ADAPTERS, RANK, SCALING = 8, 16, 2.0
CASES = [
    pytest.param(family, k, n, samples, id=f"{family.name}-{k}x{n}-{samples}x128")
    for family, samples in ((SMOLLM2, 8), (SMOLLM2, 16), (LLAMA3, 8))
    for k, n in family.linears
]
TOKENS = 128  # of a sample
Step = Callable[[], Tensor]


def operands(
    k: int, n: int, samples: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, list[LoraBranch], Tensor]:
    """x [B, S, K] with gradient, W [N, K] frozen, fp32 adapters with gradient, dy [B, S, N]."""
    torch.manual_seed(0)
    x = torch.randn(samples, TOKENS, k, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(n, k, dtype=dtype, device=device) * k**-0.5
    branches = []
    for _ in range(ADAPTERS):
        a = (torch.randn(RANK, k, device=device) * k**-0.5).requires_grad_()
        b = (torch.randn(n, RANK, device=device) * RANK**-0.5).requires_grad_()
        branches.append(LoraBranch(a, b, SCALING))
    dy = torch.randn(samples, TOKENS, n, dtype=dtype, device=device)
    return x, weight, branches, dy


def base(x: Tensor, weight: Tensor, branches: Sequence[LoraBranch], rows_of: list[int]) -> Tensor:
    return linear(x, weight)


def loop(x: Tensor, weight: Tensor, branches: Sequence[LoraBranch], rows_of: list[int]) -> Tensor:
    """LoraLayer._mixed_batch_forward of PEFT, differentiable."""
    y = linear(x, weight)
    for j, branch in enumerate(branches):
        places = [i for i, owner in enumerate(rows_of) if owner == j]
        own = x[places].to(branch.a.dtype)
        y[places] += (linear(linear(own, branch.a), branch.b) * branch.scaling).to(y.dtype)
    return y


def make_products(
    x: Tensor,
    weight: Tensor,
    branches: Sequence[LoraBranch],
    dy: Tensor,
    rows_of: list[int],
) -> Callable[[], None]:
    """Rows of an adapter that lie apart are gathered beforehand, which costs nothing here."""
    pairs = [(b.a.detach().to(x.dtype), b.b.detach().to(x.dtype)) for b in branches]
    x = x.detach()
    places = [[i for i, owner in enumerate(rows_of) if owner == j] for j in range(ADAPTERS)]
    own = [(x[where].flatten(0, 1), dy[where].flatten(0, 1)) for where in places]
    rows, grads = x.flatten(0, 1), dy.flatten(0, 1)

    def step() -> None:
        torch.mm(rows, weight.t())
        torch.mm(grads, weight)
        for (a, b), (left, grad) in zip(pairs, own, strict=True):
            t = torch.mm(left, a.t())
            torch.mm(t, b.t())
            d = torch.mm(grad, b)
            torch.mm(d, a)
            torch.mm(d.t(), left)
            torch.mm(grad.t(), t)

    return step


def make_step(
    function: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    branches: Sequence[LoraBranch],
    dy: Tensor,
    rows_of: list[int],
) -> Step:
    """Forward and backward from dy to x and the adapters; returns y."""
    leaves = [x, *(factor for branch in branches for factor in (branch.a, branch.b))]

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = function(x, weight, branches, rows_of)
        y.backward(dy)
        return y

    return step


def step_result(function: Callable[..., Tensor], *arguments) -> dict[str, Tensor]:
    x, _, branches, *_ = arguments
    y = make_step(function, *arguments)()
    result = {"y": y.detach(), "dx": x.grad}
    for j, branch in enumerate(branches):
        result |= {f"dA {j}": branch.a.grad, f"dB {j}": branch.b.grad}
    return result


@pytest.mark.parametrize("against", ["base", "products", "loop"])
@pytest.mark.parametrize("order", ["blocks", "alternating"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("family", "k", "n", "samples"), CASES)
def test_lora_segmented(
    paired, device: str, family: Family, k: int, n: int, samples: int, dtype, order, against: str
):
    """``blocks``: the samples of an adapter are neighbours; ``alternating``: they are not."""
    x, weight, branches, dy = operands(k, n, samples, dtype, device)
    rows_of = [
        i * ADAPTERS // samples if order == "blocks" else i % ADAPTERS for i in range(samples)
    ]

    def check():
        exact = [
            LoraBranch(
                branch.a.detach().double().requires_grad_(),
                branch.b.detach().double().requires_grad_(),
                SCALING,
            )
            for branch in branches
        ]
        x64 = x.detach().double().requires_grad_()
        return (
            step_result(loop, x, weight, branches, dy, rows_of),
            step_result(lora_segmented, x, weight, branches, dy, rows_of),
            step_result(loop, x64, weight.double(), exact, dy.double(), rows_of),
        )

    operands_of_step = (x, weight, branches, dy, rows_of)
    if against == "products":
        other: Callable[[], object] = make_products(*operands_of_step)
    else:
        other = make_step({"base": base, "loop": loop}[against], *operands_of_step)
    paired(
        other,
        make_step(lora_segmented, x, weight, branches, dy, rows_of),
        check=check,
        dtype=dtype,
        model=family.name,
        shape=[samples * TOKENS, k, n],
        rank=RANK,
        adapters=ADAPTERS,
        order=order,
        against=against,
        base_dtype=str(dtype).removeprefix("torch."),
        adapter_dtype="float32",
    )

"""A bottleneck adapter against the same module in plain torch, forward and backward: in eager mode,
compiled, and against its six products alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fasttune.nn import BottleneckAdapter

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.1},
    "channels": {"scaling": "channels"},
}


class Eager(nn.Module):
    """The formula, with the parameters of an adapter."""

    def __init__(self, adapter: BottleneckAdapter) -> None:
        super().__init__()
        self.down, self.up, self.scale, self.p = (
            adapter.down, adapter.up, adapter.scale, adapter.dropout,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        u = functional.dropout(self.up(self.down(x).relu()), self.p, self.training)
        return x + (u if self.scale is None else u * self.scale)


def adapter(width: int, size: int, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    made = BottleneckAdapter(width, size, "relu", dtype=dtype, **options)
    nn.init.normal_(made.up.weight, std=size**-0.5)
    return made


def make_step(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    leaves = [*module.parameters(), x]

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = module(x)
        y.backward(dy)
        return y.detach()

    return step


def results(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Without dropout, whose masks differ."""
    module, kept = copy.deepcopy(module), x.detach().clone().requires_grad_()
    for own in module.modules():
        if hasattr(own, "dropout"):
            own.dropout = 0.0
        if hasattr(own, "p"):
            own.p = 0.0
    y = make_step(module, kept, dy)()
    return {"y": y, "dx": kept.grad, **{n: p.grad for n, p in module.named_parameters()}}


def products(module: Any, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """The six products that a step has to do, and nothing else."""
    down, up = module.down.weight.detach(), module.up.weight.detach()
    x = x.detach()

    def step() -> None:
        z = torch.mm(x, down.t())
        torch.mm(z, up.t())
        dz = torch.mm(dy, up)
        torch.mm(dz, down)
        torch.mm(dz.t(), x)
        torch.mm(dy.t(), z)

    return step


def case(device: str, dtype: str, width: int, size: int, rows: int, kind: str) -> Any:
    """Our adapter, the same in plain torch, its input, its incoming gradient, and the check."""
    ours = adapter(width, size, DTYPES[dtype], KINDS[kind]).to(device)
    stock = Eager(copy.deepcopy(ours))
    x = torch.randn(rows, width, device=device).to(DTYPES[dtype]).requires_grad_()
    dy = torch.randn(rows, width, device=device).to(DTYPES[dtype])

    def check() -> tuple[dict, dict, dict]:
        truth = results(copy.deepcopy(stock).double(), x.double(), dy.double())
        return results(stock, x, dy), results(ours, x, dy), truth

    return ours, stock, x, dy, check


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [256, 2048])
@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize("width", [384, 576, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bottleneck_time(
    paired, device: str, dtype: str, width: int, size: int, rows: int, kind: str
) -> None:
    ours, stock, x, dy, check = case(device, dtype, width, size, rows, kind)
    paired(
        make_step(stock, x, dy), make_step(ours, x, dy), check=check, dtype=DTYPES[dtype],
        model="bottleneck", shape=[rows, width, size], variant=kind, base_dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("against", ["products", "compiled"])
@pytest.mark.parametrize("rows", [256, 2048])
@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize("width", [384, 576, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bottleneck_limits(
    paired, device: str, dtype: str, width: int, size: int, rows: int, against: str
) -> None:
    """Ours against what is left if everything but the products cost nothing, and against
    ``torch.compile`` of the module."""
    ours, stock, x, dy, check = case(device, dtype, width, size, rows, "plain")
    if against == "products":
        other: Callable[[], object] = products(ours, x, dy)
    else:
        other = make_step(torch.compile(stock), x, dy)
    paired(
        other, make_step(ours, x, dy), check=check, dtype=DTYPES[dtype],
        model="bottleneck", shape=[rows, width, size], against=against, base_dtype=dtype,
    )  # fmt: skip

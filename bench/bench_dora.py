"""A DoRA layer against PEFT's, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from agreement import trainable
from torch import Tensor, nn

import fasttune

FEATURES, OUTPUTS, RANK = 2048, 2048, 16
ROWS = (16, 256, 2048)


def layer(dtype: torch.dtype, dropout: float, device: str) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(FEATURES, OUTPUTS, bias=False, dtype=dtype))
    config = peft.LoraConfig(
        r=RANK, target_modules=["0"], use_dora=True, lora_dropout=dropout, init_lora_weights=False
    )
    return peft.get_peft_model(base, config).train().to(device)


def make_step(model: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    weights = [*trainable(model).values(), x]

    def step() -> Tensor:
        for weight in weights:
            weight.grad = None
        y = model(x)
        y.backward(dy)
        return y.detach()

    return step


def results(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        kept = x.detach().clone().requires_grad_()
    was = model.training
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    y = make_step(model, kept, dy)()
    model.train(was)
    found = {"y": y, "dx": kept.grad}
    return {**found, **{n: p.grad for n, p in trainable(model).items() if p.grad is not None}}


def products(model: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """The products that a step has to do, and nothing else: two of the base, three of each factor
    in the dtype of x, and that of the norm, W A^T, since A changes with every step."""
    own = {name: p.detach().to(x.dtype) for name, p in model.named_parameters()}
    base, a, b = (
        next(p for name, p in own.items() if part in name)
        for part in ("base_layer", "lora_A", "lora_B")
    )
    x = x.detach()

    def step() -> None:
        torch.mm(x, base.t())
        t = torch.mm(x, a.t())
        torch.mm(t, b.t())
        torch.mm(dy, base)
        d = torch.mm(dy, b)
        torch.mm(d, a)
        torch.mm(d.t(), x)
        torch.mm(dy.t(), t)
        torch.mm(base, a.t())

    return step


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("rows", ROWS)
def test_dora_time(paired, device: str, rows: int, dtype: torch.dtype, dropout: float) -> None:
    stock, patched = (layer(dtype, dropout, device) for _ in range(2))
    fasttune.patch(patched, strict=True)
    x = torch.randn(rows, FEATURES, device=device).to(dtype).requires_grad_()
    dy = torch.randn(rows, OUTPUTS, device=device).to(dtype)

    def check() -> tuple[dict, dict, dict]:
        truth = results(layer(dtype, dropout, device).double(), x.double(), dy.double())
        return results(stock, x, dy), results(patched, x, dy), truth

    paired(
        make_step(stock, x, dy), make_step(patched, x, dy), check=check, dtype=dtype,
        model="dora", shape=[rows, FEATURES, OUTPUTS], rank=RANK, dropout=dropout,
        base_dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("rows", ROWS)
def test_dora_limit(paired, device: str, rows: int, dtype: torch.dtype) -> None:
    """Against what is left if everything but the products cost nothing."""
    stock, patched = (layer(dtype, 0.0, device) for _ in range(2))
    fasttune.patch(patched, strict=True)
    x = torch.randn(rows, FEATURES, device=device).to(dtype).requires_grad_()
    dy = torch.randn(rows, OUTPUTS, device=device).to(dtype)

    def check() -> tuple[dict, dict, dict]:
        truth = results(layer(dtype, 0.0, device).double(), x.double(), dy.double())
        return results(stock, x, dy), results(patched, x, dy), truth

    paired(
        products(patched, x, dy), make_step(patched, x, dy), check=check, dtype=dtype,
        model="dora", shape=[rows, FEATURES, OUTPUTS], rank=RANK, against="products",
        base_dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip

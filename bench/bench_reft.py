"""A LoReFT intervention against pyreft's formula in plain torch, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from fasttune.nn import LoReft

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCH = 4


class Rotation(nn.Module):
    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(width, rank)))


class Eager(nn.Module):
    """Gathers, edits and scatters; evaluates the orthogonal parametrisation where pyreft does."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        # Without trivialisation, as LoReft: the parameters of the two are then the same.
        self.rotate_layer = orthogonal(Rotation(width, rank), use_trivialization=False)
        self.learned_source = nn.Linear(width, rank)

    def forward(self, h: Tensor, rows: Tensor) -> Tensor:
        x = h.view(-1, h.shape[-1])[rows].to(self.learned_source.weight.dtype)
        rotated = x @ self.rotate_layer.weight
        change = (self.learned_source(x) - rotated) @ self.rotate_layer.weight.t()
        return h.view(-1, h.shape[-1]).index_put((rows,), (x + change).to(h.dtype)).view(h.shape)


def rows_of(tokens: int, positions: int | None, device: str) -> Tensor:
    """The first and the last ``positions`` tokens of each sequence, or all."""
    place = torch.arange(tokens, device=device)
    if positions is not None:
        place = torch.cat([place[:positions], place[tokens - positions :]])
    return (torch.arange(BATCH, device=device).unsqueeze(1) * tokens + place).reshape(-1)


def make_step(module: nn.Module, h: Tensor, rows: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    leaves = [*module.parameters(), h]

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        with torch.no_grad():  # a new value of the parameter, as after a step of an optimizer
            module.rotate_layer.parametrizations.weight.original.mul_(1.0)
        y = module(h, rows)
        y.backward(dy)
        return y.detach()

    return step


def results(module: nn.Module, h: Tensor, rows: Tensor, dy: Tensor) -> dict[str, Any]:
    kept = h.detach().clone().requires_grad_()
    y = make_step(module, kept, rows, dy)()
    return {"y": y, "dh": kept.grad, **{n: p.grad for n, p in module.named_parameters()}}


@pytest.mark.parametrize("positions", [1, 7, None], ids=["f1+l1", "f7+l7", "all"])
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("width", [576, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reft_time(
    paired: Any, device: str, dtype: str, width: int, rank: int, positions: int | None
) -> None:
    torch.manual_seed(0)
    stock, ours = Eager(width, rank).to(device), LoReft(width, rank).to(device)
    ours.load_state_dict(stock.state_dict())
    tokens = 256
    rows = rows_of(tokens, positions, device)
    h = torch.randn(BATCH, tokens, width, device=device).to(DTYPES[dtype]).requires_grad_()
    dy = torch.randn(BATCH, tokens, width, device=device).to(DTYPES[dtype])

    def check() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        truth = Eager(width, rank).double().to(device)
        truth.load_state_dict(stock.state_dict())
        exact = results(truth, h.double(), rows, dy.double())
        return results(stock, h, rows, dy), results(ours, h, rows, dy), exact

    paired(
        make_step(stock, h, rows, dy), make_step(ours, h, rows, dy), check=check,
        dtype=DTYPES[dtype], model="reft", shape=[BATCH, tokens, width, rank],
        variant="all" if positions is None else f"f{positions}+l{positions}", base_dtype=dtype,
    )  # fmt: skip

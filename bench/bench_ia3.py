"""What PEFT's (IA)^3 adds to a linear layer, forward and backward.

The whole layer, stock against patched, and each of the two against its bare base layer, which takes
the place of stock there: the overhead is the difference of the two times of one record.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from agreement import trainable
from torch import Tensor, nn

import fasttune

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# (features in, features out, whether the input is scaled): keys of a grouped attention, an MLP's
# last layer.
LAYERS = {"k_proj": (2048, 512, False), "down_proj": (8192, 2048, True)}


def model(kind: str, dtype: torch.dtype, patched: bool) -> nn.Module:
    features, outputs, feedforward = LAYERS[kind]
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(features, outputs, bias=False, dtype=dtype))
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [])
    made = peft.get_peft_model(base, config).train()
    return fasttune.patch(made, strict=True) if patched else made


def operands(kind: str, dtype: torch.dtype, rows: int, device: str) -> tuple[Tensor, Tensor]:
    """x and dy."""
    features, outputs, _ = LAYERS[kind]
    x = torch.randn(rows, features, device=device).to(dtype).requires_grad_()
    return x, torch.randn(rows, outputs, device=device).to(dtype)


def make_step(made: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    leaves = [*trainable(made).values(), x]

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = made(x)
        y.backward(dy)
        return y.detach()

    return step


def results(made: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = make_step(made, leaf, dy)()
    return {"y": y, "dx": leaf.grad, **{n: p.grad for n, p in trainable(made).items()}}


@pytest.mark.parametrize("rows", [512, 4096])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ia3_layer_time(paired, device: str, dtype: str, kind: str, rows: int) -> None:
    stock, patched = (model(kind, DTYPES[dtype], flag).to(device) for flag in (False, True))
    x, dy = operands(kind, DTYPES[dtype], rows, device)

    def check() -> tuple[dict, dict, dict]:
        truth = results(copy.deepcopy(stock).double(), x.double(), dy.double())
        return results(stock, x, dy), results(patched, x, dy), truth

    paired(
        make_step(stock, x, dy), make_step(patched, x, dy), check=check, dtype=DTYPES[dtype],
        model="ia3", shape=[rows, *LAYERS[kind][:2]], variant=kind, base_dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("rows", [512, 4096])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ia3_overhead_time(
    paired, device: str, dtype: str, kind: str, rows: int, patched: bool
) -> None:
    layer = model(kind, DTYPES[dtype], patched).to(device)
    bare = layer.base_model.model[0].base_layer
    x, dy = operands(kind, DTYPES[dtype], rows, device)

    def check() -> tuple[dict, dict, dict]:
        """Vectors of ones: y and dx are those of the bare layer."""
        truth = results(copy.deepcopy(bare).double(), x.double(), dy.double())
        ours = results(layer, x, dy)
        return results(bare, x, dy), {name: ours[name] for name in truth}, truth

    paired(
        make_step(bare, x, dy), make_step(layer, x, dy), check=check, dtype=DTYPES[dtype],
        model="ia3", shape=[rows, *LAYERS[kind][:2]], base_dtype=dtype,
        variant=f"{kind}: {'patched' if patched else 'stock'} against the bare layer",
    )  # fmt: skip

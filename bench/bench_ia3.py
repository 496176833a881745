"""What PEFT's (IA)^3 adds to a linear layer, stock against patched, forward and backward.

Times are of the whole layer, alternated; the facts of each record carry the time of the bare linear
layer (``base_s``), so that the overhead of either side is its time less that.
"""

from __future__ import annotations

import copy
import time
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
BASE_RUNS = 10


def model(kind: str, dtype: torch.dtype, patched: bool) -> nn.Module:
    features, outputs, feedforward = LAYERS[kind]
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(features, outputs, bias=False, dtype=dtype))
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [])
    made = peft.get_peft_model(base, config).train()
    return fasttune.patch(made, strict=True) if patched else made


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


def bare_time(made: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Seconds of the frozen base layer alone: the least of a few runs."""
    base = made.base_model.model[0].base_layer
    step, best = make_step(base, x, dy), float("inf")
    for _ in range(BASE_RUNS):
        start = time.perf_counter()
        step()
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.parametrize("rows", [512, 4096])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ia3_layer_time(paired, device: str, dtype: str, kind: str, rows: int) -> None:
    stock, patched = (model(kind, DTYPES[dtype], flag).to(device) for flag in (False, True))
    features, outputs, _ = LAYERS[kind]
    x = torch.randn(rows, features, device=device).to(DTYPES[dtype]).requires_grad_()
    dy = torch.randn(rows, outputs, device=device).to(DTYPES[dtype])

    def check() -> tuple[dict, dict, dict]:
        truth = results(copy.deepcopy(stock).double(), x.double(), dy.double())
        return results(stock, x, dy), results(patched, x, dy), truth

    paired(
        make_step(stock, x, dy), make_step(patched, x, dy), check=check, dtype=DTYPES[dtype],
        model="ia3", shape=[rows, features, outputs], variant=kind, base_dtype=dtype,
        base_s=bare_time(stock, x, dy),
    )  # fmt: skip

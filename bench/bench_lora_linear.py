"""One LoRA linear, forward and backward: PEFT's own layer in eager against the patched one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from agreement import dropout_off, trainable
from families import LLAMA3, QWEN2, SMOLLM2, Family
from torch import Tensor, nn

import fasttune

RANK, ALPHA = 16, 32
RANKS, ROWS = (4, 8, 16, 64, 256), (16, 256, 2048)  # of the sweep
TOKENS = {SMOLLM2: (16, 256, 1024), LLAMA3: (16, 128), QWEN2: (16, 128)}
CASES = [
    pytest.param(family, k, n, tokens, id=f"{family.name}-{k}x{n}-{tokens}")
    for family, token_counts in TOKENS.items()
    for k, n in family.linears
    for tokens in token_counts
]


def lora_model(
    k: int, n: int, dtype: torch.dtype, dropout: float, device: str, rank: int = RANK
) -> nn.Module:
    """A PEFT model of one linear without bias: base in ``dtype``, adapters in fp32, B not zero."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(k, n, bias=False, dtype=dtype, device=device))
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        target_modules=["0"],
        init_lora_weights=False,
    )
    return peft.get_peft_model(base, config).train()


def make_step(model: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    """Forward and backward from ``dy`` [M, N] to ``x`` [M, K] and the adapters; returns y."""
    leaves = [x, *trainable(model).values()]

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = model(x)
        y.backward(dy)
        return y

    return step


def step_result(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    with dropout_off(model):
        y = make_step(model, x, dy)()
    gradients = {name: p.grad for name, p in trainable(model).items()}
    return {"y": y.detach(), "dx": x.grad, **gradients}


each_dropout = pytest.mark.parametrize("dropout", [0.0, 0.05])
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@each_dropout
@each_dtype
@pytest.mark.parametrize(("family", "k", "n", "tokens"), CASES)
def test_lora_linear(
    paired, device: str, family: Family, k: int, n: int, tokens: int, dtype, dropout: float
):
    compare(paired, device, family, k, n, tokens, dtype, dropout, RANK)


@each_dropout
@each_dtype
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("tokens", ROWS)
def test_ranks(paired, device: str, tokens: int, rank: int, dtype, dropout: float):
    """One projection, the widest of SmolLM2, over ranks and rows."""
    compare(
        paired, device, SMOLLM2, SMOLLM2.hidden, SMOLLM2.intermediate, tokens, dtype, dropout, rank
    )


def compare(
    paired,
    device: str,
    family: Family,
    k: int,
    n: int,
    tokens: int,
    dtype,
    dropout: float,
    rank: int,
):
    stock = lora_model(k, n, dtype, dropout, device, rank)
    patched = fasttune.patch(copy.deepcopy(stock), strict=True)
    x = torch.randn(tokens, k, dtype=dtype, device=device, requires_grad=True)
    dy = torch.randn(tokens, n, dtype=dtype, device=device)

    def check():
        truth = copy.deepcopy(stock).double()
        x64 = x.detach().double().requires_grad_()
        return (
            step_result(stock, x, dy),
            step_result(patched, x, dy),
            step_result(truth, x64, dy.double()),
        )

    paired(
        make_step(stock, x, dy),
        make_step(patched, x, dy),
        check=check,
        dtype=dtype,
        model=family.name,
        shape=[tokens, k, n],
        rank=rank,
        base_dtype=str(dtype).removeprefix("torch."),
        adapter_dtype="float32",
        dropout=dropout,
    )

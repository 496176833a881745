"""PEFT's trainable tokens on the embedding of a large vocabulary: time and memory of a step."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from agreement import trainable
from torch import Tensor, nn

import fasttune

DTYPE = torch.bfloat16
VOCABULARY, FEATURES = 128_000, 4096
INDICES = list(range(VOCABULARY - 16, VOCABULARY))
TOKENS = (16, 512)


def model(patched: bool) -> nn.Module:
    torch.manual_seed(0)
    embedding = nn.Embedding(VOCABULARY, FEATURES, dtype=DTYPE)
    config = peft.TrainableTokensConfig(target_modules=["0"], token_indices=INDICES)
    made = peft.get_peft_model(nn.Sequential(embedding), config).train()
    return fasttune.patch(made) if patched else made


def make_step(made: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    weights = list(trainable(made).values())

    def step() -> Tensor:
        for weight in weights:
            weight.grad = None
        y = made(ids)
        y.backward(y)
        return y.detach()

    return step


def token_ids(tokens: int) -> Tensor:
    """Half of them trained."""
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (tokens,))
    ids[::2] = torch.tensor(INDICES)[torch.randint(len(INDICES), ((tokens + 1) // 2,))]
    return ids


def results(made: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    y = make_step(made, ids)()
    return {"y": y, **{n: p.grad for n, p in trainable(made).items() if p.grad is not None}}


def build_step(tokens: int, device: str, patched: bool) -> Callable[[], Tensor]:
    return make_step(model(patched).to(device), token_ids(tokens).to(device))


FACTS = {"model": "trainable-tokens", "shape": [VOCABULARY, FEATURES]}


@pytest.mark.parametrize("tokens", TOKENS)
def test_trainable_tokens_time(paired, device: str, tokens: int) -> None:
    stock, patched = (model(flag).to(device) for flag in (False, True))
    ids = token_ids(tokens).to(device)

    def check() -> tuple[dict, dict, dict]:
        theirs, ours = results(stock, ids), results(patched, ids)
        return theirs, ours, {name: value.double() for name, value in theirs.items()}

    paired(
        make_step(stock, ids), make_step(patched, ids), check=check, dtype=DTYPE, rows=tokens,
        **FACTS,
    )  # fmt: skip


@pytest.mark.parametrize("tokens", TOKENS)
def test_trainable_tokens_memory(compare_memory, device: str, tokens: int) -> None:
    compare_memory(build_step, tokens, device, rows=tokens, **FACTS)

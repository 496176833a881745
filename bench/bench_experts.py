"""PEFT's LoRA on the weights of experts (target_parameters): time and memory of a step.

One layer of Mixtral's experts with both stacks adapted, behind a fixed routing, so that every
variant sends the same rows to the same experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from agreement import trainable
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import fasttune

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOP_K, RANK = 2, 8


@dataclass(frozen=True)
class Shape:
    """Experts [E, 2 I, H] and [E, H, I], and the tokens of a step."""

    experts: int
    hidden: int
    intermediate: int
    tokens: int


SHAPES = {
    "tiny": Shape(4, 64, 128, 64),
    "small": Shape(8, 512, 1024, 256),
    "medium": Shape(8, 1024, 2048, 1024),
}
# A weight gathered for every row (batched_mm) is for decoding: its memory grows with the tokens.
IMPLEMENTATIONS = ("eager", "grouped_mm")


class Layer(nn.Module):
    """Experts that a fixed routing chooses."""

    def __init__(self, shape: Shape, implementation: str) -> None:
        super().__init__()
        config = MixtralConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_local_experts=shape.experts,
            num_experts_per_tok=TOP_K,
        )
        config._experts_implementation = implementation  # what set_experts_implementation sets
        self.experts = MixtralExperts(config)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=0.02)
        scores = torch.rand(shape.tokens, shape.experts)
        self.register_buffer("chosen", scores.topk(TOP_K, dim=-1).indices)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.full(self.chosen.shape, 1 / TOP_K, dtype=x.dtype, device=x.device)
        return self.experts(x, self.chosen, weights)


def model(shape: Shape, implementation: str, dtype: torch.dtype, patched: bool) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,  # a factor of zeros would leave the other without a gradient
    )
    made = peft.get_peft_model(Layer(shape, implementation).to(dtype), config).train()
    return fasttune.patch(made, strict=True) if patched else made


def operands(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x and dy."""
    torch.manual_seed(1)
    x, dy = (torch.randn(shape.tokens, shape.hidden, device=device) for _ in range(2))
    return x.to(dtype).requires_grad_(), dy.to(dtype)


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


def truth(made: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """In fp64, one expert at a time: grouped products take no fp64."""
    exact = copy.deepcopy(made).double()
    for module in exact.modules():
        if isinstance(module, MixtralExperts):
            module.config._experts_implementation = "eager"
    return results(exact, x.double(), dy.double())


def build_step(
    name: str, implementation: str, dtype: str, device: str, patched: bool
) -> Callable[[], Tensor]:
    shape = SHAPES[name]
    made = model(shape, implementation, DTYPES[dtype], patched).to(device)
    return make_step(made, *operands(shape, DTYPES[dtype], device))


def facts(name: str, implementation: str, dtype: str) -> dict[str, Any]:
    shape = SHAPES[name]
    return {
        "model": "experts",
        "shape": [shape.tokens, shape.experts, shape.hidden, shape.intermediate],
        "variant": f"{name}, {implementation}",
        "base_dtype": dtype,
    }


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_time(paired, device: str, dtype: str, implementation: str, name: str) -> None:
    shape = SHAPES[name]
    stock, patched = (
        model(shape, implementation, DTYPES[dtype], flag).to(device) for flag in (False, True)
    )
    x, dy = operands(shape, DTYPES[dtype], device)

    def check() -> tuple[dict, dict, dict]:
        return results(stock, x, dy), results(patched, x, dy), truth(stock, x, dy)

    paired(
        make_step(stock, x, dy), make_step(patched, x, dy), check=check, dtype=DTYPES[dtype],
        **facts(name, implementation, dtype),
    )  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_memory(
    compare_memory, device: str, dtype: str, implementation: str, name: str
) -> None:
    compare_memory(
        build_step, name, implementation, dtype, device, **facts(name, implementation, dtype)
    )

"""A training step of every family, small, short and long: is any slower than stock?

Times a step of stock PEFT in eager mode against the patched one. "Never slower" means a median
paired ratio (stock / fasttune here) of at least 1 / 1.05.
"""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from agreement import dropout_off, trainable
from torch import Tensor, nn

import fasttune
from fasttune.testing.families import FAMILIES, Family

RANK, ALPHA = 16, 32
TOKENS = (32, 512)
# Families whose input length is part of the model.
FIXED_LENGTH = ("image", "speech", "pair")
TEXT = [family for family in FAMILIES if family.inputs not in FIXED_LENGTH]
CASES = [
    pytest.param(family, size, tokens, id=f"{family.name}-{size}-{tokens}")
    for family in FAMILIES
    for size in ("tiny", "medium")
    for tokens in (TOKENS if family in TEXT else (24,))
]


def lora_model(family: Family, size: str, dtype: torch.dtype) -> nn.Module:
    base = (family.medium() if size == "medium" else family).build(dtype)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=False
    )
    return peft.get_peft_model(base, config).train()


def make_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    parameters = list(trainable(model).values())

    def step() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return step


def results(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and the norm over all gradients: single ones may be noise."""
    with dropout_off(model):
        loss = make_step(model, batch)()
    grads = [p.grad.double().flatten() for p in trainable(model).values() if p.grad is not None]
    return {"loss": loss, "gradients": torch.cat(grads)}


def in_wide(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    model.to(dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    wide = {
        k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in batch.items()
    }
    return results(model, wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("family", "size", "tokens"), CASES)
def test_family(paired, device: str, family: Family, size: str, tokens: int, dtype) -> None:
    batch = family.batch(dtype, tokens)
    stock = lora_model(family, size, dtype)
    patched = fasttune.patch(lora_model(family, size, dtype))
    truth = in_wide(lora_model(family, size, dtype), batch, torch.float64)
    paired(
        make_step(stock, batch),
        make_step(patched, batch),
        check=lambda: (results(stock, batch), results(patched, batch), truth),
        dtype=dtype,
        model=family.name,
        size=size,
        tokens=tokens,
        base_dtype=str(dtype).removeprefix("torch."),
    )

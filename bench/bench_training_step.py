"""A whole training step of SmolLM2-135M, 4 x 256 tokens, LoRA r 16 on all linears, AdamW."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from agreement import dropout_off, trainable
from floor import floor_step
from torch import Tensor, nn
from training import (
    BATCH,
    SEQUENCE,
    Scenario,
    batches,
    build_step,
    lora_model,
    make_step,
    own_loop_step,
)

import fasttune

SCENARIOS = (
    Scenario("bf16", torch.bfloat16, dropout=0.05),
    Scenario("bf16-no-dropout", torch.bfloat16, dropout=0.0),
    Scenario("trainer-autocast", torch.float32, dropout=0.05, autocast=True),
    Scenario("fp32", torch.float32, dropout=0.05),
)
each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)


def gradients(model: nn.Module, scenario: Scenario, device: str) -> dict[str, Tensor]:
    """The loss and every adapter gradient of the first batch, without dropout."""
    (batch, *_) = batches(device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=scenario.autocast)
    with dropout_off(model):
        with autocast:
            loss = model(**batch).loss
        loss.backward()
    result = {"loss": loss.detach()}
    for name, parameter in trainable(model).items():
        result[name], parameter.grad = parameter.grad, None
    return result


def truth_of(stock: nn.Module, scenario: Scenario, device: str) -> dict[str, Tensor]:
    """The same in the next wider dtype, without autocast."""
    wide = torch.float32 if scenario.compute_dtype == torch.bfloat16 else torch.float64
    plain = Scenario("truth", wide, scenario.dropout)
    return gradients(copy.deepcopy(stock).to(wide), plain, device)


def facts(scenario: Scenario) -> dict[str, object]:
    return {
        "model": "SmolLM2-135M, random weights",
        "tokens": [BATCH, SEQUENCE],
        "base_dtype": str(scenario.dtype).removeprefix("torch."),
        "autocast": scenario.autocast,
        "dropout": scenario.dropout,
    }


@each_scenario
def test_training_step_time(paired: Callable[..., None], device: str, scenario: Scenario):
    stock = lora_model(scenario, device)
    patched = fasttune.patch(lora_model(scenario, device), strict=True)

    # Before make_step: a Trainer wraps forward on the instance, and a copy would run the original.
    results = (
        gradients(stock, scenario, device),
        gradients(patched, scenario, device),
        truth_of(stock, scenario, device),
    )

    paired(
        make_step(scenario, stock, device),
        make_step(scenario, patched, device),
        check=lambda: results,
        dtype=scenario.compute_dtype,
        **facts(scenario),
    )


@pytest.mark.parametrize("scenario", [SCENARIOS[0], SCENARIOS[-1]], ids=lambda s: s.name)
def test_training_step_against_its_floor(
    paired: Callable[..., None], device: str, scenario: Scenario
):
    """ "Stock" is the matrix products and attention of the step alone: the ratio is below 1.

    Every part of the step that can be ours is, the optimizer too.
    """
    if device != "cpu":
        pytest.skip("the floor is written for the CPU's attention")
    patched = fasttune.patch(lora_model(scenario, device), strict=True)
    results = gradients(patched, scenario, device)
    paired(
        floor_step(scenario.dtype),
        own_loop_step(patched, batches(device), fasttune.optim.AdamW),
        check=lambda: (results, results, results),  # test_training_step_time compares with stock
        dtype=scenario.compute_dtype,
        baseline="matrix products and attention alone",
        optimizer="fasttune.optim.AdamW",
        **facts(scenario),
    )


@pytest.mark.parametrize("scenario", [SCENARIOS[0], SCENARIOS[-1]], ids=lambda s: s.name)
def test_training_step_against_compiled_stock(
    paired: Callable[..., None], device: str, scenario: Scenario
):
    """Compiling takes minutes, before the clock runs."""
    stock = lora_model(scenario, device)
    patched = fasttune.patch(lora_model(scenario, device), strict=True)
    results = (
        gradients(stock, scenario, device),
        gradients(patched, scenario, device),
        truth_of(stock, scenario, device),
    )
    stock.compile()
    paired(
        make_step(scenario, stock, device),
        make_step(scenario, patched, device),
        check=lambda: results,
        dtype=scenario.compute_dtype,
        baseline="torch.compile of stock",
        **facts(scenario),
    )


@each_scenario
def test_training_step_memory(compare_memory: Callable[..., None], device: str, scenario: Scenario):
    compare_memory(build_step, scenario, device, **facts(scenario))

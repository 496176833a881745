"""Training steps of Llama models with LoRA on all linear layers on a GPU, stock against patched.

Random weights of the published sizes, random tokens, bf16 model with fp32 adapters, r 16, dropout
0.05, SDPA attention, an own loop with torch's fused AdamW on both sides.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import peft
import pytest
import torch
import transformers
from agreement import dropout_off, trainable
from families import LLAMA3
from gpu_time import ROUNDS as ROUNDS_IN_TURN
from gpu_time import GpuTime, time_variants
from torch import Tensor, nn

import fasttune
from fasttune import adapters
from fasttune.nn import bottleneck as bottleneck_module
from fasttune.ops import policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@dataclass(frozen=True)
class Size:
    """Facts of a model and its batch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    batch: tuple[int, int]
    dropout: float = 0.05
    tied: bool = False


ROUNDS, STEPS = 3, 3
# Two bf16 steps in another order of operations differ by noise; an adapter that gets no gradient,
# or one with another mask or scale, has a relative error near 1.
GRADIENT_ERROR, ONE_GRADIENT_ERROR = 0.2, 0.5
SIZES = {
    "Llama-3.2-1B-4x2048": Size(2048, 8192, 16, 32, 8, (4, 2048), tied=True),
    "Llama-3.2-1B-1x2048": Size(2048, 8192, 16, 32, 8, (1, 2048), tied=True),
    "Llama-3.2-1B-1x512": Size(2048, 8192, 16, 32, 8, (1, 512), tied=True),
    "Llama-3.2-1B-4x2048-no-dropout": Size(2048, 8192, 16, 32, 8, (4, 2048), 0.0, tied=True),
    "Llama-3-8B-1x2048": Size(4096, 14336, 32, 32, 8, (1, 2048)),
    "Llama-3-8B-4x2048": Size(4096, 14336, 32, 32, 8, (4, 2048)),
}


def lora_model(size: Size) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, vocab_size=LLAMA3.vocabulary,
        max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=size.tied,
        use_cache=False, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            base = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=size.dropout,
        target_modules="all-linear", init_lora_weights=False,
    )  # fmt: skip
    return peft.get_peft_model(base, lora).train()


def adapter_model(size: Size) -> nn.Module:
    """With bottleneck adapters, a sixteenth of the hidden size wide, instead of LoRA."""
    model = lora_model(size).unload()
    adapters.add(model, "bench", "seq_bn", reduction_factor=16, dropout=size.dropout)
    for name, parameter in trainable(model).items():
        if name.endswith("up.weight"):
            nn.init.normal_(parameter, std=0.01)
    return model.train()


def batch_of(size: Size) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(LLAMA3.vocabulary, size.batch, generator=generator, device="cuda")
    return {"input_ids": ids, "labels": ids}


def make_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    # No step moves the weights: gradients of stock and patched are those of one model.
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.0, fused=True)

    def step() -> Tensor:
        loss: Tensor = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with dropout_off(model):
        loss = model(**batch).loss
        loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in trainable(model).items():
        found[name], parameter.grad = parameter.grad, None
    return found


def errors_of(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> tuple[float, float]:
    """The norm of the difference of all gradients over that of stock's, and the largest such."""
    names = [name for name in stock if name != "loss"]
    different = torch.stack([(ours[n] - stock[n]).norm() for n in names])
    size = torch.stack([stock[n].norm() for n in names])
    return float(different.norm() / size.norm()), float((different / size).max())


def measured(model: nn.Module, batch: dict[str, Tensor]) -> GpuTime | None:
    """None if the step does not fit into the memory of the GPU."""
    try:
        return time_variants({"step": make_step(model, batch)}, rounds=ROUNDS, steps=STEPS)["step"]
    except torch.OutOfMemoryError:
        return None
    finally:
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()


@pytest.mark.parametrize("name", SIZES)
def test_step(record, name: str) -> None:
    """One model, stock and then patched: two of 8B and their activations do not fit."""
    size = SIZES[name]
    model, batch = lora_model(size), batch_of(size)
    few = {key: value[:1, :512] for key, value in batch.items()}
    expected = loss_and_gradients(model, few)
    stock = measured(model, batch)
    fasttune.patch(model, strict=True)
    found = loss_and_gradients(model, few)
    error, largest = errors_of(found, expected)
    assert abs(float(found["loss"] / expected["loss"]) - 1) < 1e-2
    assert error < GRADIENT_ERROR and largest < ONE_GRADIENT_ERROR, (error, largest)
    ours = measured(model, batch)
    assert ours is not None
    own = {"busy": ours.busy_ms, "launches": ours.launches, "peak_mib": ours.peak_bytes / 2**20}
    facts: dict[str, Any] = {
        "kind": "gpu", "unit": "ms", "runs": ROUNDS, "baseline": "stock", "model": name,
        "tokens": list(size.batch), "dropout": size.dropout, "dtype": "bf16", "rank": 16,
        "gradient_error": [error, largest], "fasttune": ours.ms,
    }  # fmt: skip
    if stock is None:
        facts |= {"stock": None, "ratio": None, **{k: [None, v] for k, v in own.items()}}
    else:
        facts |= {
            "stock": stock.ms, "ratio": stock.ms / ours.ms, "busy": [stock.busy_ms, ours.busy_ms],
            "busy_ratio": stock.busy_ms / ours.busy_ms, "spread": [stock.spread, ours.spread],
            "launches": [stock.launches, ours.launches],
            "peak_mib": [stock.peak_bytes / 2**20, ours.peak_bytes / 2**20],
        }  # fmt: skip
    record(**facts)
    print(facts, flush=True)


@pytest.mark.parametrize("tokens", [512, 1024, 2048])
def test_a_short_step(record, tokens: int) -> None:
    """Stock and patched in turn: a step that waits for the host varies from minute to minute."""
    size = replace(SIZES["Llama-3.2-1B-1x512"], batch=(1, tokens))
    stock, batch = lora_model(size), batch_of(size)
    ours = fasttune.patch(copy.deepcopy(stock), strict=True)
    expected, found = loss_and_gradients(stock, batch), loss_and_gradients(ours, batch)
    error, largest = errors_of(found, expected)
    assert error < GRADIENT_ERROR and largest < ONE_GRADIENT_ERROR, (error, largest)
    variants = {"stock": make_step(stock, batch), "fasttune": make_step(ours, batch)}
    times = time_variants(variants, steps=4)
    by = [times["stock"], times["fasttune"]]
    record(
        kind="gpu", unit="ms", runs=ROUNDS_IN_TURN, baseline="stock", tokens=list(size.batch),
        model="Llama-3.2-1B", dropout=size.dropout, dtype="bf16", rank=16,
        gradient_error=[error, largest], stock=by[0].ms, fasttune=by[1].ms,
        ratio=by[0].ms / by[1].ms, busy=[time.busy_ms for time in by],
        spread=[time.spread for time in by], launches=[time.launches for time in by],
        peak_mib=[time.peak_bytes / 2**20 for time in by],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["Llama-3.2-1B-1x2048", "Llama-3.2-1B-4x2048"])
def test_a_step_with_bottleneck_adapters(record, monkeypatch, name: str) -> None:
    """Adapters computed by torch against the fused kernels, in turn in one patched model."""
    size = SIZES[name]
    model, batch = adapter_model(size), batch_of(size)
    fasttune.patch(model)
    step = make_step(model, batch)
    unchanged = bottleneck_module.bottleneck_not_faster

    def by_torch() -> None:
        monkeypatch.setattr(bottleneck_module, "bottleneck_not_faster", lambda *facts: True)
        step()
        monkeypatch.setattr(bottleneck_module, "bottleneck_not_faster", unchanged)

    with policy.no_limits():
        times = time_variants({"torch": by_torch, "fasttune": step}, rounds=ROUNDS, steps=STEPS)
    by = [times["torch"], times["fasttune"]]
    record(
        kind="gpu", unit="ms", runs=ROUNDS, baseline="torch", tokens=list(size.batch), model=name,
        dropout=size.dropout, dtype="bf16", width=size.hidden // 16, stock=by[0].ms,
        fasttune=by[1].ms, ratio=by[0].ms / by[1].ms, busy=[time.busy_ms for time in by],
        spread=[time.spread for time in by], launches=[time.launches for time in by],
        peak_mib=[time.peak_bytes / 2**20 for time in by],
    )  # fmt: skip

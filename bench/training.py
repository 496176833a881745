"""Training steps of a SmolLM2-135M with LoRA on all linears, stock or patched."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import peft
import torch
import transformers
from agreement import trainable
from families import SMOLLM2
from torch import Tensor, nn

import fasttune

BATCH, SEQUENCE = 4, 256
BATCHES = 8  # drawn once, used in turn
LEARNING_RATE = 1e-4
IGNORED = -100  # the label that transformers leaves out of the loss
MAX_GRAD_NORM = 1.0  # the Trainer's default

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Scenario:
    """How the model is trained; adapters are always fp32."""

    name: str
    dtype: torch.dtype  # of the base model
    dropout: float
    autocast: bool = False  # bf16 autocast, by the Trainer of transformers

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the matrix products of the base model."""
        return torch.bfloat16 if self.autocast else self.dtype


def lora_model(scenario: Scenario, device: str) -> nn.Module:
    """Random weights, the same for the same scenario; B of the adapters is not zero."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=SMOLLM2.hidden,
        intermediate_size=SMOLLM2.intermediate,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=SMOLLM2.vocabulary,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        use_cache=False,
    )
    base = transformers.LlamaForCausalLM(config).to(device, scenario.dtype)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=16,
        lora_alpha=32,
        lora_dropout=scenario.dropout,
        target_modules="all-linear",
        init_lora_weights=False,
    )
    return peft.get_peft_model(base, lora).train()


def batches(device: str) -> list[Batch]:
    """Dense batches of random tokens, labels as the ids."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(BATCHES):
        ids = torch.randint(SMOLLM2.vocabulary, (BATCH, SEQUENCE), generator=generator).to(device)
        drawn.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return drawn


def own_loop_step(
    model: nn.Module,
    data: Sequence[Batch],
    adamw: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> Callable[[], Tensor]:
    """Forward, backward, AdamW; no autocast."""
    optimizer = adamw(trainable(model).values(), lr=LEARNING_RATE)
    turn = 0

    def step() -> Tensor:
        nonlocal turn
        loss = model(**data[turn % len(data)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turn += 1
        return loss.detach()

    return step


def trainer_step(model: nn.Module, data: Sequence[Batch], device: str) -> Callable[[], Tensor]:
    """What ``Trainer(bf16=True)`` does between two batches, one call at a time."""
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        bf16=True,
        use_cpu=device == "cpu",
        learning_rate=LEARNING_RATE,
        max_grad_norm=MAX_GRAD_NORM,
        per_device_train_batch_size=BATCH,
        report_to=[],
    )
    trainer = transformers.Trainer(model=model, args=arguments)
    trainer.create_optimizer()
    wrapped, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped, trainer.optimizer = wrapped, optimizer
    trainer.current_gradient_accumulation_steps = 1  # set by its loop over the batches
    turn = 0

    def step() -> Tensor:
        nonlocal turn
        batch = data[turn % len(data)]
        tokens = (batch["labels"] != IGNORED).sum()
        loss = trainer.training_step(wrapped, batch, num_items_in_batch=tokens)
        trainer.accelerator.clip_grad_norm_(wrapped.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        wrapped.zero_grad()
        turn += 1
        return loss

    return step


def make_step(scenario: Scenario, model: nn.Module, device: str) -> Callable[[], Tensor]:
    """One optimiser step of ``scenario`` on ``model``, returning the loss."""
    data = batches(device)
    return trainer_step(model, data, device) if scenario.autocast else own_loop_step(model, data)


def build_step(scenario: Scenario, device: str, patched: bool) -> Callable[[], Tensor]:
    """One variant alone, for a process of its own."""
    model = lora_model(scenario, device)
    return make_step(scenario, fasttune.patch(model, strict=True) if patched else model, device)

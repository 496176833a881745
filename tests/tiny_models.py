"""Tiny random models with LoRA, and what tests compare of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def tiny_llama(**changes: Any) -> nn.Module:
    """A two-layer random Llama with 499 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 499,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes}))


def with_lora(model: nn.Module, **changes: Any) -> nn.Module:
    """PEFT LoRA on every linear layer, with lora_B away from zero so that every gradient counts."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**{**options, **changes}))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every gradient by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b| in norms."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    """The loss of a causal model on seeded tokens."""
    tokens = torch.randint(3, 499, (2, 9), generator=torch.Generator().manual_seed(seed))
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss

"""Shared fixtures: tiny models with LoRA, and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, with_lora
from torch import nn

from fasttune.ops import policy


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fuse_small_inputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are fused although nothing is gained, except where a test is about that."""
    if not request.node.get_closest_marker("limits"):
        monkeypatch.setattr(policy, "limits", policy.NO_LIMITS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def make_lora_model() -> Callable[..., nn.Module]:
    """``make(dtype=..., **LoraConfig arguments)``: the same weights at every call."""

    def make(dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
        return with_lora(tiny_llama().to(dtype), **changes).train()

    return make


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows of 23 tokens; the first five labels are masked."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 499, (2, 23), generator=generator)
    labels = tokens.clone()
    labels[:, :5] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

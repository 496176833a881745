"""A model with several adapters."""

from __future__ import annotations

import pytest
import torch
from mixed_batches import ADAPTERS
from peft import LoraConfig
from torch import nn


@pytest.fixture
def make_model(make_lora_model):
    """``make(dtype, **LoraConfig arguments)``: three adapters beside the active "default"."""

    def make(dtype=torch.float32, adapters=ADAPTERS, **changes):
        model = make_lora_model(dtype)
        for seed, (name, (rank, targets)) in enumerate(adapters.items()):
            options = {"r": rank, "lora_alpha": 2 * rank + seed, "target_modules": targets}
            torch.manual_seed(50 + seed)
            model.add_adapter(name, LoraConfig(**{**options, **changes}))
            for parameter_name, parameter in model.named_parameters():
                if f"lora_B.{name}" in parameter_name:
                    nn.init.normal_(parameter, std=0.05)
        model.set_requires_grad("default", False)
        model.set_requires_grad(list(adapters))
        return model.train()

    return make

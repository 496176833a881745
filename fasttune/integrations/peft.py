"""PEFT's models and layers as fasttune sees them: what is shared by its methods.

Each kind of layer has a file of its own, ``peft_<kind>.py``. Only these read PEFT's attributes.

Read from PEFT 0.21 (``peft/tuners/tuners_utils.py``, ``peft/utils/other.py``);
tests/integrations/test_private_names.py fails loudly when it moves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from fasttune import _torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_RANK = 256  # of every backend of lora_linear
NO_ADAPTER = "no active adapter on this layer"


def loaded() -> bool:
    """True if PEFT has been imported: else no model can have its layers."""
    return "peft" in sys.modules


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel; any other model itself."""
    if not loaded():
        return model
    from peft import PeftMixedModel, PeftModel

    if isinstance(model, PeftMixedModel):
        return cast("nn.Module", model.base_model.model)
    return cast("nn.Module", model.get_base_model()) if isinstance(model, PeftModel) else model


def has_layers(model: nn.Module) -> bool:
    """True if PEFT has injected layers of any method."""
    if not loaded():
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def lora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every LoRA layer of any type in the model, injected by PEFT, transformers or diffusers."""
    if not loaded():
        return
    from peft.tuners.lora.layer import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def other_tuner_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """PEFT layers of other methods than LoRA and trainable tokens."""
    if not loaded():
        return
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        known = isinstance(module, (LoraLayer, TrainableTokensLayer))
        if isinstance(module, BaseTunerLayer) and not known:
            yield name, module


def method_of(layer: nn.Module) -> str:
    """The name of the method that a PEFT layer belongs to, as its package has it: "vera"."""
    for base in type(layer).__mro__:
        parts = base.__module__.split(".")
        if parts[:2] == ["peft", "tuners"]:
            return parts[2]
    return type(layer).__name__


def is_modules_to_save(module: nn.Module) -> bool:
    """True for PEFT's wrapper of fully trained modules."""
    if not loaded():
        return False
    from peft.utils.other import ModulesToSaveWrapper

    return isinstance(module, ModulesToSaveWrapper)


def saved_module(module: Any) -> nn.Module | None:
    """The module that a ModulesToSaveWrapper runs now, or None if that is not one plain module."""
    if module.disable_adapters:
        active: nn.Module = module.original_module
        return active
    names = module.active_adapters
    if len(names) != 1 or names[0] not in module.modules_to_save:
        return module.original_module if not names else None
    chosen: nn.Module = module.modules_to_save[names[0]]
    return chosen


def injected_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters injected into the model, cheap enough for every forward."""
    config = model.__dict__.get("peft_config")
    return tuple(config) if isinstance(config, dict) else ()


def plain(tensor: Tensor) -> bool:
    """True for a tensor with its own storage, neither sharded nor quantised."""
    return type(tensor) in (Tensor, nn.Parameter)


def plain_weight(layer: Any) -> Tensor | None:
    """The weight [N, K] of a base layer that is x W^T + bias and nothing else, or None: then its
    own forward must run (quantised, sharded, hooked, offloaded, or a class of its own).
    """
    base = layer._modules["base_layer"]
    conv1d = type(base) is _conv1d()
    if (type(base) is not nn.Linear and not conv1d) or _torch.hooked(base):
        return None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if weight is None or not plain(weight) or (bias is not None and not plain(bias)):
        return None
    rows: Tensor = weight.t() if conv1d else weight
    if weight.dtype not in FLOATS or rows.shape != (layer.out_features, layer.in_features):
        return None
    if bias is not None and bias.shape != rows.shape[:1]:  # torch broadcasts it, kernels do not
        return None
    return rows


@lru_cache(maxsize=1)
def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    layer: type[nn.Module] = Conv1D
    return layer


def active(layer: Any) -> list[str]:
    """The active adapters that a LoRA layer, no embedding, has, in the order PEFT adds them."""
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


def is_disabled(layer: Any) -> bool:
    """True if the layer computes its base layer only."""
    return bool(layer.disable_adapters)


def is_merged(layer: Any) -> bool:
    """True if an adapter is merged into the base weight."""
    return bool(layer.merged)


def active_names(layer: Any) -> set[str]:
    """The active adapters, whether or not this layer has them."""
    return set(layer.active_adapters)


def embedding_scale(layer: Any) -> Tensor | None:
    """What some embeddings multiply their output by, or None."""
    scale: Tensor | None = layer._get_embed_scale()
    return scale

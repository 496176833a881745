"""PEFT's DoRA on linear layers as fasttune sees it.

Read from PEFT 0.21 (``peft/tuners/lora/variants.py``); tests/integrations/test_private_names.py
fails loudly when it moves.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fasttune import _torch
from fasttune.integrations import peft
from fasttune.reason import Reason


def is_dora(layer: Any, adapter: str) -> bool:
    """True if an adapter of a LoRA Linear is DoRA."""
    from peft.tuners.lora.variants import DoraLinearVariant

    return type(layer.lora_variant.get(adapter)) is DoraLinearVariant


def adapter_of(layer: Any) -> str | None:
    """The one active adapter of a LoRA Linear if it is DoRA, else None."""
    if not layer.lora_variant:
        return None
    names = peft.active(layer)
    return names[0] if len(names) == 1 and is_dora(layer, names[0]) else None


def why_original(layer: Any, adapter: str, x: Tensor) -> Reason | None:
    """Why a DoRA adapter cannot be fused in this call, after :func:`peft_linear.why_original` had
    no reason.
    """
    magnitude = layer.lora_magnitude_vector[adapter]
    if _torch.hooked(magnitude):
        return Reason(f"a hook on lora_magnitude_vector[{adapter!r}]")
    if peft.plain_weight(layer) is None:
        return Reason("DoRA on a base whose own forward must run")
    if not peft.plain(magnitude.weight) or magnitude.weight.device != x.device:
        return Reason("the magnitude is sharded or on another device")
    if isinstance(layer.scaling[adapter], Tensor):
        return Reason("DoRA with a tensor as scaling")
    if x.dim() == 1:  # PEFT returns [1, N] then
        return Reason("DoRA of one vector")
    return None


def has_dropout(layer: Any, adapter: str) -> bool:
    """True if an adapter has a dropout module, whether or not it drops now."""
    return type(layer.lora_dropout[adapter]) is not nn.Identity


def magnitude(layer: Any, adapter: str) -> Tensor:
    """The magnitude [N] of a DoRA adapter."""
    weight: Tensor = layer.lora_magnitude_vector[adapter].weight
    return weight

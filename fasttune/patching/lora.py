"""The fused forward of PEFT's LoRA Linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttune import _torch
from fasttune.integrations import peft
from fasttune.ops import LoraProjection
from fasttune.ops.lora_linear import apply_group
from fasttune.ops.policy import (
    TOO_SMALL,
    fast_backend_missing,
    lora_not_faster,
    lora_too_small,
)
from fasttune.patching import mixed_layer, state, swap
from fasttune.patching.session import EXCLUDED, Session
from fasttune.reason import Reason

KIND = "lora"
_TOO_SMALL = Reason(TOO_SMALL, expected=True)


def patch_layers(session: Session) -> None:
    """Swap every LoRA Linear of the model; the other PEFT layers are named in the report."""
    for name, layer in peft.lora_layers(session.model):
        if not session.chosen(name):
            session.skip(KIND, name, EXCLUDED)
        elif not peft.is_linear(swap.original_class(layer)):
            title = swap.original_class(layer).__name__
            session.skip(KIND, name, f"LoRA on {title} is not fused yet")
        elif KIND in swap.kinds_of(layer):
            state.of(layer, KIND).strict = session.strict
        elif (reason := peft.static_reason(layer)) is not None:
            session.skip(KIND, name, reason.text)
        elif not session.refuse(KIND, name, layer):
            session.swap(layer, name, KIND)
    for name, layer in peft.other_tuner_layers(session.model):
        session.skip(KIND, name, f"PEFT method {type(layer).__name__} is not fused yet")


def _forward(layer: nn.Module, original: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    mixed = mixed_layer.forward(layer, original, state.of(layer, KIND), x, args, kwargs)
    if mixed is not None:
        return mixed
    reason = _why_original(layer, x, args, kwargs)
    if reason is None:
        projection = peft.projection(layer)
        if not lora_not_faster(x, projection):
            return _fused(layer, x, projection)
        reason = _TOO_SMALL
    if not torch.compiler.is_compiling():
        state.note_fallback(state.of(layer, KIND), reason)
    return original(layer, x, *args, **kwargs)


def _fused(layer: nn.Module, x: Tensor, projection: LoraProjection) -> Tensor:
    compute_dtype = _torch.autocast_dtype(x.device.type) or x.dtype
    y = apply_group(x, (projection,), compute_dtype)[0]
    state.note_output(state.of(layer, KIND), y)
    return y


def _why_original(
    layer: nn.Module, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Reason | None:
    weight = peft.base_weight(layer)
    if type(x) is Tensor and x.dim() and weight is not None and lora_too_small(x, weight):
        return _TOO_SMALL
    reason = peft.why_original(layer, x, args, kwargs)
    if reason is not None:
        return reason
    missing = fast_backend_missing(x.device.type)
    return None if missing is None else Reason(missing)


swap.register_kind(KIND, _forward)

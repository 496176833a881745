"""The fused forward of PEFT's (IA)^3 Linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fasttune import _torch
from fasttune.integrations import peft_ia3
from fasttune.ops import LoraProjection
from fasttune.ops.ia3_scale import apply_ia3_scale
from fasttune.ops.lora_linear import apply_group
from fasttune.ops.policy import ia3_too_small
from fasttune.patching import guard, state, swap
from fasttune.patching.session import EXCLUDED, Session
from fasttune.reason import Reason

KIND = "ia3"


def patch_layers(session: Session) -> None:
    """Swap every (IA)^3 Linear; convolutions are named in the report."""
    for name, layer in peft_ia3.ia3_layers(session.model):
        original = swap.original_class(layer)
        if not session.chosen(name):
            session.skip(KIND, name, EXCLUDED)
        elif not peft_ia3.is_linear_like(original):
            session.skip(KIND, name, f"(IA)^3 on {original.__name__} is not fused yet")
        elif KIND in swap.kinds_of(layer):
            state.of(layer, KIND).strict = session.strict
        elif not session.refuse(KIND, name, layer):
            session.swap(layer, name, KIND)


def _forward(layer: Any, original: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    reason = _why_original(layer, x, args, kwargs)
    if reason is None:
        scale = peft_ia3.scale(list(peft_ia3.active_vectors(layer).values()))
        given = peft_ia3.converted(layer, x)
        if peft_ia3.scales_input(layer):
            return _scaled_input(layer, given, scale)
        base = layer.base_layer(given)
        reason = _why_base_output(layer, base, scale)
        if reason is None:
            y = apply_ia3_scale(base, scale)
            state.note_output(state.of(layer, KIND), y)
            return y
    if reason is not guard.COMPILED:
        state.note_fallback(state.of(layer, KIND), reason)
    return original(layer, x, *args, **kwargs)


def _scaled_input(layer: Any, x: Tensor, scale: Tensor) -> Any:
    scaled = apply_ia3_scale(x, scale)
    state.note_output(state.of(layer, KIND), scaled)
    return _base_of(layer, scaled)


def _base_of(layer: Any, scaled: Tensor) -> Any:
    """A trained base weight rebuilds its input from what made that: it is not kept."""
    weight = peft_ia3.trained_weight(layer, scaled)
    if weight is None:
        return layer.base_layer(scaled)
    projection = LoraProjection(weight, layer.base_layer.bias, ())
    compute_dtype = _torch.autocast_dtype(scaled.device.type) or scaled.dtype
    return apply_group(scaled, (projection,), compute_dtype)[0]


def scale_of_input(layer: nn.Module, like: Tensor) -> Tensor | None:
    """The factors [K] that a layer multiplies an input such as ``like`` [*, K] by, for who makes
    that input and then calls :func:`forward_scaled`; None if the layer must be called itself.
    """
    ours = type(layer).__dict__.get("_fasttune_kind") == KIND
    if not ours or _torch.hooked(layer) or torch_module._has_any_global_hook():
        return None
    if not peft_ia3.scales_input(layer) or peft_ia3.converts(layer):
        return None
    if _why_original(layer, like, (), {}) is not None:
        return None
    return peft_ia3.scale(list(peft_ia3.active_vectors(layer).values()))


def forward_scaled(layer: nn.Module, scaled: Tensor) -> Any:
    """What a layer returns for an input that is scaled already."""
    record = state.of(layer, KIND)
    state.note_fused(record, state.backend_of(scaled) or record.backend, 0)
    return _base_of(layer, scaled)


def _why_original(
    layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Reason | None:
    reason = guard.why_original(layer, x, args, kwargs)
    if reason is not None:
        return reason
    if kwargs:  # an argument of None still goes to the base layer
        return guard.EXTRA
    reason = peft_ia3.why_original(layer, x)
    if reason is not None:
        return reason
    features = layer.in_features if peft_ia3.scales_input(layer) else layer.out_features
    (dtype, *_) = {vector.dtype for vector in peft_ia3.active_vectors(layer).values()}
    return guard.TOO_SMALL if ia3_too_small(x, features, casts=dtype != x.dtype) else None


def _why_base_output(layer: Any, base: Any, scale: Tensor) -> Reason | None:
    """Why what a base layer returned cannot be scaled; that layer then runs twice, in PEFT's."""
    if type(base) is not Tensor or base.dtype not in guard.FLOATS or base.device != scale.device:
        return Reason("its base layer returns other than a plain float tensor on x's device")
    if base.dim() == 0 or base.shape[-1] != scale.shape[0]:
        return Reason(f"its base layer returns {tuple(base.shape)} for {scale.shape[0]} factors")
    wider = torch.promote_types(base.dtype, scale.dtype)
    if peft_ia3.converts(layer) and wider != base.dtype:
        return Reason(f"PEFT returns {wider} where the base layer returns {base.dtype}")
    return None


swap.register_kind(KIND, _forward, of_tensor=True)

"""The fused forward of PEFT's VeRA, AdaLoRA and DeLoRA layers: LoRA with scaled ranks and
outputs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fasttune import _torch
from fasttune.integrations import peft_lowrank
from fasttune.ops.lora_linear import apply_group
from fasttune.ops.policy import lora_not_faster, lora_too_small, vera_not_faster
from fasttune.patching import guard, state, swap
from fasttune.patching.lora import why_base_output
from fasttune.patching.session import EXCLUDED, Session
from fasttune.reason import Reason

KIND = "lowrank"
_HIGH_RANK = Reason("the original forward is as fast for VeRA of this rank", expected=True)


def patch_layers(session: Session) -> None:
    """Swap every layer of these methods on a linear base; the others are named in the report."""
    for name, layer in peft_lowrank.lowrank_layers(session.model):
        original = swap.original_class(layer)
        if not session.chosen(name):
            session.skip(KIND, name, EXCLUDED)
        elif not peft_lowrank.is_linear_like(original):
            title = peft_lowrank.title(layer)
            session.skip(KIND, name, f"{title} on {original.__name__} is not fused yet")
        elif KIND in swap.kinds_of(layer):
            state.of(layer, KIND).strict = session.strict
        elif not session.refuse(KIND, name, layer):
            session.swap(layer, name, KIND)


def _forward(layer: Any, original: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    record = state.of(layer, KIND)
    if guard.is_small(record, x, lora_too_small, layer.out_features):
        return original(layer, x, *args, **kwargs)
    reason = _why_original(layer, x, args, kwargs)
    if reason is None:
        projection = peft_lowrank.projection(layer, x)
        reason = why_base_output(x, projection.base)
        if reason is None:
            compute_dtype = _torch.autocast_dtype(x.device.type) or x.dtype
            y: Tensor = apply_group(x, (projection,), compute_dtype)[0]
            state.note_output(record, y)
            return y.to(x.dtype) if peft_lowrank.returns_input_dtype(layer) else y
    if reason is not guard.COMPILED:
        state.note_fallback(record, reason)
    return original(layer, x, *args, **kwargs)


def _why_original(
    layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Reason | None:
    reason = guard.why_original(layer, x, args, kwargs)
    if reason is not None:
        return reason
    if kwargs:  # an argument of None still goes to the base layer
        return guard.EXTRA
    reason = peft_lowrank.why_original(layer, x)
    if reason is not None:
        return reason
    branches = peft_lowrank.branches(layer)
    if lora_not_faster(x, layer.out_features, [branch.dropout_p for branch in branches]):
        return guard.TOO_SMALL
    scaled = [branch.a.shape[0] for branch in branches if branch.out_scale is not None]
    return _HIGH_RANK if scaled and vera_not_faster(x, scaled) else None


swap.register_kind(KIND, _forward, of_tensor=True)

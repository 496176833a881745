"""A LoRA Linear in a batch whose samples have different adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttune import _torch
from fasttune.errors import PatchError
from fasttune.integrations import peft, peft_mixed
from fasttune.ops.lora_segmented import apply_segmented
from fasttune.ops.policy import fast_backend_missing, lora_too_small
from fasttune.patching import assignment, guard, state
from fasttune.reason import Reason

_UNBOUND = (
    "is recomputed in backward without the assignment of its forward: use the model's "
    "gradient_checkpointing_enable, or enter mixed_adapters inside the checkpointed function"
)


def forward(
    layer: Any,
    original: Any,
    record: state.ModuleState,
    x: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The output of a layer in a mixed batch: ours, or PEFT's ``adapter_names``; None if all
    samples have the active adapters.

    Raises:
        PatchError: the call cannot be computed; never is an assignment left out.
        ValueError: the batch has another size than the assignment, or what PEFT raises.
    """
    if torch.compiler.is_compiling():
        if assignment.traced():
            raise PatchError("mixed_adapters: torch.compile cannot trace a mixed batch")
        return None
    names = assignment.names_of(layer)
    if names is None and assignment.lost_by(layer):
        raise PatchError(f"{record.name}: a DataParallel replica cannot run a mixed batch")
    if _torch.inside_backward():
        if assignment.is_unbound() and (record.mixed or names is not None):
            raise PatchError(f"{record.name} {_UNBOUND}")
    else:
        record.mixed = names is not None
    if names is not None:
        return _assigned(layer, original, record, x, names, args, kwargs)
    if kwargs.get("adapter_names") is not None:
        return _adapter_names(layer, original, record, x, args, kwargs)
    return None


def _assigned(
    layer: Any,
    original: Any,
    record: state.ModuleState,
    x: Any,
    names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    if peft.is_disabled(layer):
        state.note_fallback(record, Reason("adapters are disabled", expected=True))
        y: Tensor = original(layer, x, *args, **kwargs)
        return y
    if peft.is_merged(layer):
        raise PatchError(f"{record.name}: adapters are merged, so that no batch can be mixed")
    if args or any(value is not None for value in kwargs.values()):
        raise PatchError(f"{record.name}: called with extra arguments in a mixed batch")
    projection, own, rows_of = peft_mixed.projection(layer, names)
    reason = peft_mixed.why_not(layer, x, own)
    if reason is not None:
        raise PatchError(f"{record.name}: no mixed batch: {reason.text}")
    if x.shape[0] != len(names):
        raise ValueError(
            f"names: expected one per sample, got {len(names)} for the {x.shape[0]} samples of "
            f"{record.name}"
        )
    return _segmented(record, x, projection, rows_of)


def _adapter_names(
    layer: Any,
    original: Any,
    record: state.ModuleState,
    x: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """PEFT's inference with several adapters: its errors, and our op where that is plain LoRA."""
    peft_mixed.check_forward_args(layer, x, args, kwargs)
    reason = None
    extra = [value for name, value in kwargs.items() if name != "adapter_names"]
    if peft.is_disabled(layer):
        reason = Reason("adapters are disabled", expected=True)
    elif args or any(value is not None for value in extra):
        reason = Reason("called with extra arguments")
    else:
        projection, own, rows_of = peft_mixed.projection(layer, kwargs["adapter_names"])
        reason = peft_mixed.why_not(layer, x, own) or _why_not_faster(x, layer.out_features)
        if reason is None:
            return _segmented(record, x, projection, rows_of)
    state.note_fallback(record, reason)
    y: Tensor = original(layer, x, *args, **kwargs)
    return y


def _why_not_faster(x: Tensor, outputs: int) -> Reason | None:
    if lora_too_small(x, outputs):
        return guard.TOO_SMALL
    missing = fast_backend_missing(x.device.type)
    return None if missing is None else Reason(missing)


def _segmented(record: state.ModuleState, x: Tensor, projection: Any, rows_of: list[int]) -> Tensor:
    dtype = _torch.autocast_dtype(x.device.type) or x.dtype
    weight, bias, branches = projection.weight, projection.bias, projection.branches
    y = apply_segmented(x, weight, branches, rows_of, dtype, bias=bias)
    state.note_output(record, y)
    return y

"""The fused forward of PEFT's LoRA layers: Linear here, Embedding in lora_embedding.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from fasttune import _torch
from fasttune.integrations import (
    peft,
    peft_dora,
    peft_embedding,
    peft_experts,
    peft_ia3,
    peft_known,
    peft_linear,
    peft_lowrank,
)
from fasttune.ops import LoraProjection
from fasttune.ops.dora_linear import apply_dora
from fasttune.ops.lora_linear import apply_group
from fasttune.ops.policy import (
    fast_backend_missing,
    lora_not_faster,
    lora_rank_not_faster,
    lora_too_small,
)
from fasttune.patching import (
    assignment,
    groups,
    guard,
    lora_embedding,
    mixed_layer,
    state,
    swap,
)
from fasttune.patching.guard import FLOATS
from fasttune.patching.session import EXCLUDED, Session
from fasttune.reason import Reason

KIND = "lora"
_HIGH_RANK = Reason(
    "the original forward is as fast for this rank and number of rows", expected=True
)


def patch_layers(session: Session) -> None:
    """Swap every LoRA Linear and Embedding; the other PEFT layers are named in the report."""
    families: dict[str, list[nn.Module]] = {}
    for name, layer in peft.lora_layers(session.model):
        # Of a parameter: experts.py; of AdaLoRA: lowrank.py.
        if peft_experts.is_wrapper(layer) or peft_lowrank.is_lowrank(layer):
            continue
        original = swap.original_class(layer)
        linear = peft_linear.is_linear_like(original)
        if not session.chosen(name):
            session.skip(KIND, name, EXCLUDED)
        elif not linear and not peft_embedding.is_embedding(original):
            session.skip(KIND, name, f"LoRA on {original.__name__} is not fused yet")
        elif KIND in swap.kinds_of(layer):
            state.of(layer, KIND).strict = session.strict
        elif (reason := _static_reason(layer, linear)) is not None:
            session.skip(KIND, name, reason.text)
        elif not session.refuse(KIND, name, layer):
            session.swap(layer, name, KIND)
        if linear and KIND in swap.kinds_of(layer):
            families.setdefault(name.rpartition(".")[0], []).append(layer)
    if session.groups:
        groups.register(families.values())
    else:
        groups.forget(layer for family in families.values() for layer in family)
    for name, layer in peft.other_tuner_layers(session.model):
        if not (peft_ia3.is_ia3(layer) or peft_lowrank.is_lowrank(layer)):  # kinds of their own
            session.skip(KIND, name, f"PEFT's {peft.method_of(layer)} is not fused")


def _static_reason(layer: nn.Module, linear: bool) -> Reason | None:
    return peft_linear.static_reason(layer) if linear else peft_embedding.static_reason(layer)


def _forward(layer: Any, original: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    record: state.ModuleState = state.of(layer, KIND)
    eager = not is_compiling()
    plain = eager and not (args or kwargs or layer.lora_variant)
    if (
        plain
        and not assignment.anywhere()
        and (
            guard.is_small(record, x, lora_too_small, layer.out_features)
            or _is_slower(layer, record, x)
        )
    ):
        record.mixed = False
        if assignment.seen:
            record.small = None  # a recomputation of a mixed batch has to come this far
        return original(layer, x)
    mixed = mixed_layer.forward(layer, original, record, x, args, kwargs)
    if mixed is not None:
        return mixed
    if eager and not (args or kwargs):
        fetched = groups.fetch(layer, x, _as_member)
        if fetched is not None:
            state.note_fused(record, state.backend_of(fetched) or record.backend, 0)
            return fetched
    if plain and (known := _known(layer, x)) is not None:
        return _fused(layer, x, known)
    reason = _why_original(layer, x, args, kwargs)
    if reason is None and (adapter := peft_dora.adapter_of(layer)) is not None:
        return _fused_dora(layer, x, adapter)
    if reason is None:
        projection = peft_linear.projection(layer, x)
        reason = why_base_output(x, projection.base)
        if reason is None:
            record.known = peft_known.of(layer, projection)
            return _fused(layer, x, projection)
    if eager:
        record.known = None  # it keeps tensors alive that the layer may have parted with
        state.note_fallback(record, reason)
    return original(layer, x, *args, **kwargs)


def _is_slower(layer: Any, record: state.ModuleState, x: Any) -> bool:
    """Whether PEFT's forward is known to be as fast before the checks, because nothing is dropped
    or for its rank; counted if it is. It reads dropouts and ranks anew, as one that is added may
    make our forward the faster one.
    """
    if type(x) is not Tensor or x.dtype not in FLOATS:
        return False
    ranks = _active_ranks(layer)
    if not ranks:
        return False
    dropouts = layer._modules["lora_dropout"]._modules.values() if layer.training else ()
    drops = any([type(dropout) is not nn.Identity for dropout in dropouts])
    if not drops and lora_not_faster(x, layer.out_features, ()):
        guard.count_small(record)
    elif lora_rank_not_faster(x, max(ranks), (1.0,) if drops else ()):
        state.note_fallback(record, _HIGH_RANK)
    else:
        return False
    record.known = None  # it keeps tensors alive that the layer may have parted with
    return True


def _active_ranks(layer: Any) -> list[int]:
    """Of the active adapters that are the layer's: without one it may be a member of a group."""
    active, own = layer._active_adapter, layer._modules["lora_A"]._modules
    names = [active] if isinstance(active, str) else active
    return [layer.r[name] for name in names if name in own]


def _fused(layer: nn.Module, x: Tensor, projection: LoraProjection) -> Tensor:
    compute_dtype = _torch.autocast_dtype(x.device.type) or x.dtype
    alone = projection.weight is None or _torch.hooked(layer)
    members = groups.gather(layer, x, projection, _as_member, alone=alone)
    ys = apply_group(x, [own for _, own in members], compute_dtype)
    groups.keep(members, x, ys)
    state.note_output(state.of(layer, KIND), ys[0])
    return ys[0]


def _known(layer: Any, x: Any) -> LoraProjection | None:
    """What the last fused call computed, if this one computes it too: a fast "yes" to all that
    ``_why_original`` asks, for a call without further arguments.
    """
    known = state.of(layer, KIND).known
    if known is None or peft_linear.why_call(layer, x, (), {}) is not None:
        return None
    if not known.holds(layer, x) or _why_not_faster(layer, x, known.projection):
        return None
    found: LoraProjection = known.projection
    return found


def _as_member(layer: Any, x: Any) -> LoraProjection | None:
    """What a layer computes in a group, or None if it computes alone."""
    if _torch.hooked(layer):
        return None
    if not is_compiling() and (known := _known(layer, x)) is not None:
        return known
    reason = _why_original(layer, x, (), {})
    if reason is not None and reason.text != peft.NO_ADAPTER:
        return None
    weight = peft.plain_weight(layer)
    if weight is None or peft_dora.adapter_of(layer) is not None:
        return None
    branches = peft_linear.branches(layer) if reason is None else ()
    projection = LoraProjection(weight, layer.base_layer.bias, branches)
    if reason is None:
        state.of(layer, KIND).known = peft_known.of(layer, projection)
    return projection


def _fused_dora(layer: Any, x: Tensor, adapter: str) -> Tensor:
    (branch,) = peft_linear.branches(layer)
    weight = peft.plain_weight(layer)
    assert weight is not None and isinstance(branch.scaling, float | int)
    y = apply_dora(
        x, weight, branch.a, branch.b, peft_dora.magnitude(layer, adapter),
        _torch.autocast_dtype(x.device.type) or x.dtype,
        bias=layer.base_layer.bias, scaling=branch.scaling, dropout_p=branch.dropout_p,
        second_product=peft_dora.has_dropout(layer, adapter) and layer.training,
    )  # fmt: skip
    state.note_output(state.of(layer, KIND), y)
    return y


def _why_original(
    layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Reason | None:
    # PEFT's DoRA multiplies by a K x K identity: no input is too small to gain.
    dora = peft_dora.adapter_of(layer)
    small = dora is None and type(x) is Tensor and not is_compiling()
    if small and lora_too_small(x, layer.out_features):
        return guard.TOO_SMALL
    reason = peft_linear.why_original(layer, x, args, kwargs)
    if reason is not None:
        return reason
    if dora is not None:
        reason = peft_dora.why_original(layer, dora, x)
        if reason is not None:
            return reason
        missing = fast_backend_missing(x.device.type)
        return None if missing is None else Reason(missing)
    branches = peft_linear.branches(layer)
    return _why_not_faster(layer, x, LoraProjection(None, None, branches))


def _why_not_faster(layer: Any, x: Tensor, projection: LoraProjection) -> Reason | None:
    """Why PEFT's forward is as fast for a layer that can be fused, or None."""
    if lora_too_small(x, layer.out_features):
        return guard.TOO_SMALL
    if x.is_cpu:
        dropouts = [branch.dropout_p for branch in projection.branches]
        if lora_not_faster(x, layer.out_features, dropouts):
            return guard.TOO_SMALL
        ranks = [branch.a.shape[0] for branch in projection.branches]
        if ranks and lora_rank_not_faster(x, max(ranks), dropouts):
            return _HIGH_RANK
    missing = fast_backend_missing(x.device.type)
    return None if missing is None else Reason(missing)


def why_base_output(x: Tensor, base: Any) -> Reason | None:
    """Why the branches cannot be added to what a base layer's own forward returned.

    That forward then runs a second time, in PEFT's.
    """
    if base is None:
        return None
    if type(base) is not Tensor or base.dtype not in FLOATS or base.device != x.device:
        return Reason("its base layer returns other than a plain float tensor on x's device")
    if base.shape[:-1] != x.shape[:-1]:
        return Reason(f"its base layer maps {tuple(x.shape)} to {tuple(base.shape)}")
    return None


def _embedding_forward(layer: nn.Module, original: Any, ids: Any, *args: Any, **kwargs: Any) -> Any:
    return lora_embedding.forward(layer, original, state.of(layer, KIND), ids, args, kwargs)


swap.register_kind(KIND, _forward, of_tensor=True, awake_with="lora_variant")  # DoRA always gains
swap.register_kind(KIND, _embedding_forward, class_name="Embedding")

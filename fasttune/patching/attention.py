"""Attention modules: rotary embedding and, on the CPU, attention itself, through changed globals.

The module's own forward keeps running, in a copy that sees our rotary function and an attention
interface whose ``sdpa`` is ours where it covers the call. What each stands for is proven first
(rotary) or is transformers' own function (attention).
"""

from __future__ import annotations

import inspect
import threading
import types
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fasttune import _torch
from fasttune.integrations import transformers
from fasttune.ops.attention import apply_attention
from fasttune.ops.policy import (
    attention_is_faster,
    attention_too_small,
    fast_backend_missing,
    rope_too_small,
)
from fasttune.ops.rope import apply_rope
from fasttune.patching import guard, rebind, rotary, state, swap
from fasttune.patching.session import Session
from fasttune.reason import Reason

KIND = "attention"
_ARGUMENTS = 4  # q, k, cos, sin
_NOTHING_OF_OURS = Reason("its attention is not sdpa, or torch's sdpa is as fast", expected=True)


@dataclass(frozen=True)
class AttentionPlan:
    """Global names of a forward and what they stand for.

    Attributes:
        rotations: (name of a rotary function, what it computes).
        interface: name of transformers' attention interface, "" if the forward does not read it.
    """

    rotations: tuple[tuple[str, rotary.Rotation], ...]
    interface: str


def patch_layers(session: Session) -> None:
    """Swap every module whose forward looks up a proven rotary function or the interface."""
    for name, module in session.candidates(KIND):
        plan = _plan(session, swap.original_class(module).forward)
        if plan is not None and not session.refuse(KIND, name, module):
            session.swap(module, name, KIND, plan)


def _plan(session: Session, forward: Any) -> AttentionPlan | None:
    key = (KIND, forward)
    if key not in session.proofs:
        session.proofs[key] = _find(session, forward)
    plan: AttentionPlan | None = session.proofs[key]
    return plan


def _find(session: Session, forward: Any) -> AttentionPlan | None:
    rotations, interface = [], ""
    for name, value in rebind.global_names(forward).items():
        if transformers.is_attention_interface(value):
            interface = name
        elif rotary.looks_rotary(value):
            if ("rotary", value) not in session.proofs:
                session.proofs["rotary", value] = rotary.prove(value)
            rotation = session.proofs["rotary", value]
            if rotation is not None:
                rotations.append((name, rotation))
    if not rotations and not interface:
        return None
    return AttentionPlan(tuple(rotations), interface)


# ---------------------------------------------------------------------------- forward


class _Running(threading.local):
    """Records of the modules whose forward runs on this thread, the innermost last."""

    def __init__(self) -> None:
        self.records: list[state.ModuleState] = []


_running = _Running()


def _forward(module: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
    record = state.of(module, KIND)
    if torch.compiler.is_compiling():
        return original(module, *args, **kwargs)
    if not module.training and not torch.is_grad_enabled():
        state.note_fallback(record, guard.INFERENCE)
        return original(module, *args, **kwargs)
    x = args[0] if args else kwargs.get("hidden_states")
    shapes = _shapes(args, kwargs) if isinstance(x, Tensor) else None
    if shapes is not None and guard.was_small(record, x, shapes):
        return original(module, *args, **kwargs)
    calls, small = record.calls, record.fallbacks[guard.TOO_SMALL.text]
    _running.records.append(record)
    try:
        output = _rebound(original, record.plan)(module, *args, **kwargs)
    finally:
        _running.records.pop()
    too_small = record.fallbacks[guard.TOO_SMALL.text] - small
    if record.calls == calls:
        state.note_fallback(record, _NOTHING_OF_OURS)
    elif isinstance(x, Tensor) and record.calls - calls == too_small:
        guard.remember_small(record, x, shapes)
    return output


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Size, ...]:
    """Of all inputs: the keys may come from another than the first, and a recomputation has to take
    the path of its forward."""
    inputs = (*args, *kwargs.values())
    return tuple([value.shape for value in inputs if isinstance(value, Tensor)])


@lru_cache(maxsize=1024)
def _rebound(original: types.FunctionType, plan: AttentionPlan) -> Any:
    names = rebind.global_names(original)
    changed: dict[str, Any] = {
        name: _Rotary(names[name], rotation) for name, rotation in plan.rotations
    }
    if plan.interface:
        interface = names[plan.interface]
        changed[plan.interface] = transformers.InterfaceWithSdpa(interface, _attention)
    return rebind.with_globals(original, changed)


class _Rotary:
    """Stands for a rotary function inside one forward."""

    def __init__(self, original: Any, rotation: rotary.Rotation) -> None:
        self.original, self.rotation = original, rotation
        parameters = list(inspect.signature(original).parameters.values())[_ARGUMENTS:]
        self.defaults = {p.name: p.default for p in parameters}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        record = _running.records[-1]
        plain = {name: value for name, value in kwargs.items() if not self._is_default(name, value)}
        reason = _why_rotary_original(self.rotation, args, plain)
        if reason is not None:
            state.note_fallback(record, reason)
            return self.original(*args, **kwargs)
        q, k, cos, sin = args
        rotation = self.rotation
        if (q.dtype, cos.dtype) in rotation.widened:
            q, k = q.to(cos.dtype), k.to(cos.dtype)
        q2, k2 = apply_rope(
            q, k, rotation.angles(cos), rotation.angles(sin), interleaved=rotation.interleaved
        )
        state.note_output(record, q2)
        return q2, k2

    def _is_default(self, name: str, value: Any) -> bool:
        return name in self.defaults and value is self.defaults[name]


def _why_rotary_original(
    rotation: rotary.Rotation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Reason | None:
    if len(args) != _ARGUMENTS or kwargs:
        return Reason("the rotary embedding is called with extra arguments")
    q, k, cos, sin = args
    if any(type(t) is not Tensor for t in args):
        return Reason("the rotary embedding is called with other than plain tensors")
    if _torch.in_functorch():
        return Reason("called inside torch.func")
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return Reason(f"rotary embedding of q {tuple(q.shape)} and cos {tuple(cos.shape)}")
    if cos.shape[0] not in (1, q.shape[0]) or cos.shape[1] != q.shape[2] != k.shape[2]:
        return Reason(f"rotary embedding of q {tuple(q.shape)} and cos {tuple(cos.shape)}")
    width = cos.shape[2] * (2 if rotation.tables == "narrow" else 1)
    if width != q.shape[3] and not rotation.partial:
        return Reason("a partial rotary embedding")
    if cos.requires_grad or sin.requires_grad:
        return Reason("the angles of the rotary embedding are trained")
    known = (q.dtype, cos.dtype) in rotation.proven | rotation.widened
    if k.dtype != q.dtype or not known or cos.dtype != sin.dtype:
        return Reason(f"rotary embedding of {q.dtype} by {cos.dtype} is not proven")
    if rope_too_small(q, k):
        return guard.TOO_SMALL
    missing = fast_backend_missing(q.device.type)
    return None if missing is None else Reason(missing)


def _attention(
    original: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """transformers' ``sdpa_attention_forward``, by our op where that is faster (the CPU)."""
    call = None
    if not args:
        call = transformers.sdpa_call(module, query, key, attention_mask, kwargs)
    if call is None or not attention_is_faster(query, key):
        if call is not None and attention_too_small(query, key):
            state.note_fallback(_running.records[-1], guard.TOO_SMALL)
        return original(module, query, key, value, attention_mask, *args, **kwargs)
    y = apply_attention(query, key, value, mask=call.mask, causal=call.causal, scale=call.scale)
    state.note_output(_running.records[-1], y)
    return y.transpose(1, 2).contiguous(), None


swap.register_kind(KIND, _forward)

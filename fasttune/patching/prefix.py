"""Prefix tuning (P-Tuning v2) of PEFT: its projection runs once, not once a sample, and the cached
prefix survives gradient checkpointing.

PEFT hands the encoder the same tokens B times. On the CPU they are an expanded view: one sample is
encoded, and the result expanded. On a GPU they arrive as a copy, whose rows could differ: every
virtual token is encoded once, and the tokens look theirs up. Either way the gradients of all
samples meet before the projection's backward.

Gradient checkpointing (which PEFT refuses when the adapter is created, and which fails when it is
enabled later): transformers takes the cache away from a layer that will run twice, because layers
append to it. Here they get one that they only read.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.errors import PatchError
from fasttune.integrations import peft_prefix
from fasttune.patching import guard, state, swap
from fasttune.patching.session import EXCLUDED, Session
from fasttune.reason import Reason

KIND = "prefix"
MODEL = "prefix_model"  # of the model that is given the prefix; has no record of its own
_NO_GAIN = Reason("one sample, or no projection to save", expected=True)


class _Last(threading.local):
    record: state.ModuleState | None = None  # of the encoder that ran last


_last = _Last()


def patch_layers(session: Session) -> None:
    """Swap every encoder of prefix tuning, and the models that are given its prefix."""
    for name, encoder in peft_prefix.encoders(session.model):
        if not session.chosen(name):
            session.skip(KIND, name, EXCLUDED)
        elif KIND in swap.kinds_of(encoder):
            state.of(encoder, KIND).strict = session.strict
        elif not session.refuse(KIND, name, encoder):
            session.swap(encoder, name, KIND)
    for model, own in peft_prefix.prefixed_models(session.model):
        patched = any(KIND in swap.kinds_of(encoder) for encoder in own)
        if patched and MODEL not in swap.kinds_of(model) and "forward" not in model.__dict__:
            _swap_model(session, model)


def _swap_model(session: Session, model: nn.Module) -> None:
    swap.swap(model, MODEL)
    session.on_undo(lambda: swap.restore(model, MODEL))


def _forward(encoder: Any, original: Any, prefix: Any, *args: Any, **kwargs: Any) -> Any:
    record = _last.record = state.of(encoder, KIND)
    reason = _why_original(encoder, prefix, args, kwargs)
    if reason is not None:
        if reason is not guard.COMPILED:
            state.note_fallback(record, reason)
        return original(encoder, prefix, *args, **kwargs)
    if _same_samples(prefix):
        encoded: Tensor = original(encoder, prefix[:1]).expand(prefix.shape[0], -1, -1)
    else:
        tokens = torch.arange(peft_prefix.virtual_tokens(encoder), device=prefix.device)
        encoded = nn.functional.embedding(prefix, original(encoder, tokens[None])[0])
    state.note_fused(record, "torch", 0)
    return encoded


def _same_samples(prefix: Tensor) -> bool:
    return prefix.stride(0) == 0


def _why_original(
    encoder: Any, prefix: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Reason | None:
    if torch.compiler.is_compiling():
        return guard.COMPILED
    if not encoder.training and not torch.is_grad_enabled():
        return guard.INFERENCE
    if args or kwargs:
        return guard.EXTRA
    if type(prefix) is not Tensor or prefix.dim() != 2:
        return Reason("the tokens of the prefix are no plain [B, T]")
    if prefix.shape[0] < 2 or not (encoder.prefix_projection or _same_samples(prefix)):
        return _NO_GAIN
    classes = [swap.original_class(part) for part in peft_prefix.projection_of(encoder)]
    return peft_prefix.why_not_once(encoder, classes)


def _model_forward(model: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
    name = next((n for n in peft_prefix.CACHE_ARGUMENTS if kwargs.get(n) is not None), None)
    if name is None or not model.training or torch.compiler.is_compiling():
        return original(model, *args, **kwargs)
    layers = peft_prefix.checkpointed_layers(model)
    if not layers or not torch.is_grad_enabled() or not peft_prefix.trains(kwargs[name]):
        return original(model, *args, **kwargs)
    reason = peft_prefix.why_not_replayed(layers, kwargs[name])
    if reason is not None:
        if _last.record is not None:
            state.note_fallback(_last.record, reason)
        return original(model, *args, **kwargs)
    cache = peft_prefix.replayable(kwargs[name])
    with peft_prefix.keeping_cache(layers):
        output = original(model, *args, **{**kwargs, name: cache})
    unread = peft_prefix.unread(cache)
    if unread:
        raise PatchError(
            f"{type(model).__name__} ignores the prefix of its layers {unread} under gradient "
            "checkpointing; disable that"
        )
    return output


swap.register_kind(KIND, _forward)
swap.register_kind(MODEL, _model_forward, in_stock=True)

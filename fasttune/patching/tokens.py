"""The forward of PEFT's trainable tokens without a copy of the embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttune import _torch
from fasttune.integrations import peft, peft_tokens
from fasttune.ops.replaced_rows import embedding_with_rows, linear_with_rows
from fasttune.patching import guard, state, swap
from fasttune.patching.session import EXCLUDED, Session
from fasttune.reason import Reason

KIND = "tokens"


def patch_layers(session: Session) -> None:
    """Swap every layer of trainable tokens, the embedding's and that of a head tied to it."""
    for name, layer in peft_tokens.layers(session.model):
        if not session.chosen(name):
            session.skip(KIND, name, EXCLUDED)
        elif KIND in swap.kinds_of(layer):
            state.of(layer, KIND).strict = session.strict
        elif not session.refuse(KIND, name, layer):
            session.swap(layer, name, KIND)


def _forward(layer: Any, original: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    reason = _why_original(layer, x, args, kwargs)
    if reason is not None:
        if reason is not guard.COMPILED:
            state.note_fallback(state.of(layer, KIND), reason)
        return original(layer, x, *args, **kwargs)
    plan = peft_tokens.rows_and_indices(layer)
    base: Any = layer.base_layer
    if isinstance(base, nn.Embedding):
        y = embedding_with_rows(x, base.weight, *plan, padding_idx=base.padding_idx)
        scale = peft.embedding_scale(layer)
        y = y if scale is None else y * scale.to(y.dtype)
    else:
        y = linear_with_rows(x, base.weight, *plan)
    state.note_fused(state.of(layer, KIND), "torch", 0)
    return y


def _why_original(
    layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Reason | None:
    if torch.compiler.is_compiling():
        return guard.COMPILED
    if args or kwargs:
        return guard.EXTRA
    if type(x) is not Tensor or _torch.in_functorch():
        return Reason(f"input is {type(x).__name__}, or it is called inside torch.func")
    return peft_tokens.why_original(layer)


swap.register_kind(KIND, _forward)

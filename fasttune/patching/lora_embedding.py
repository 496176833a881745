"""The fused forward of PEFT's LoRA Embedding: its base layer runs as it is, the branches are added
to what that returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.integrations import peft_embedding
from fasttune.ops import LoraBranch
from fasttune.ops.lora_embedding import apply_lora_embedding
from fasttune.ops.policy import fast_backend_missing, lora_embedding_not_faster
from fasttune.patching import guard, state, swap
from fasttune.patching.variants import Variants
from fasttune.reason import Reason


def forward(
    layer: Any,
    original: Any,
    record: state.ModuleState,
    ids: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The output of a layer for token ids, by our op or by PEFT's own forward."""
    reason = _why_original(layer, ids, args, kwargs)
    if reason is None:
        base = layer.base_layer(ids)
        reason = _why_base_output(layer, ids, base)
        if reason is None:
            y = apply_lora_embedding(
                base,
                ids,
                peft_embedding.branches(layer),
                padding_idx=peft_embedding.padding_idx(layer),
            )
            state.note_output(record, y)
            return y
    if reason is not guard.COMPILED:
        state.note_fallback(record, reason)
    return original(layer, ids, *args, **kwargs)


def _why_original(
    layer: Any, ids: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Reason | None:
    if torch.compiler.is_compiling():
        return guard.COMPILED
    reason = peft_embedding.why_original(layer, ids, args, kwargs)
    if reason is not None:
        return reason
    if lora_embedding_not_faster(ids, peft_embedding.branches(layer)):
        return guard.TOO_SMALL
    missing = fast_backend_missing(ids.device.type)
    return None if missing is None else Reason(missing)


def _why_base_output(layer: Any, ids: Tensor, base: Any) -> Reason | None:
    """Why the branches cannot be added to what the base layer returned; it then runs twice."""
    if type(base) is not Tensor or base.dtype not in guard.FLOATS or base.device != ids.device:
        return Reason("its base layer returns other than a plain float tensor on the ids' device")
    if base.shape != (*ids.shape, layer.out_features):
        return Reason(f"its base layer maps {tuple(ids.shape)} to {tuple(base.shape)}")
    return None


def variants(layer: Any, ids: Tensor) -> Variants:
    """For verify: of what is added to the output of the base, which stands for the input."""
    with torch.no_grad(), swap.stock():  # the base runs once more, and stays fixed
        base = layer.base_layer(ids)
    branches, padding_idx = peft_embedding.branches(layer), peft_embedding.padding_idx(layer)
    everything = {
        f"{name}[{j}]": factor
        for j, branch in enumerate(branches)
        for name, factor in (("lora_embedding_A", branch.a), ("lora_embedding_B", branch.b))
    }
    leaves = {name: factor for name, factor in everything.items() if factor.requires_grad}

    def factors(values: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Any]:
        own = {**everything, **dict(zip(leaves, values, strict=True))}.values()
        own_in = [factor if dtype is None else factor.to(dtype) for factor in own]
        scales = [branch.scaling for branch in branches]
        return list(zip(own_in[::2], own_in[1::2], scales, strict=True))

    def formula(y: Tensor, values: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        result = y
        for a, b, scaling in factors(values, dtype):
            looked_up = nn.functional.embedding(ids, a.t(), padding_idx=padding_idx)
            result = result + looked_up @ b.t() * scaling
        return result.to(y.dtype)

    def fused(y: Tensor, values: Sequence[Tensor]) -> Tensor:
        own = [LoraBranch(*factor) for factor in factors(values)]
        return apply_lora_embedding(y, ids, own, padding_idx=padding_idx)

    return Variants(
        leaves,
        fused=fused,
        stock=formula,
        truth=lambda y, v: formula(y, v, torch.float64),
        depth=max(layer.out_features, ids.numel()),
        x=base,
    )

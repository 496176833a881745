"""PEFT's trainable tokens as fasttune sees them.

Read from PEFT 0.21 (``peft/tuners/trainable_tokens/layer.py``);
tests/integrations/test_private_names.py fails loudly when it moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fasttune import _torch
from fasttune.integrations import peft
from fasttune.reason import Reason


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer of trainable tokens in the model."""
    if not peft.loaded():
        return
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensLayer):
            yield name, module


def why_original(layer: Any) -> Reason | None:
    """Why a layer of trainable tokens takes PEFT's own forward now, or None."""
    if layer.disable_adapters or not layer.active_adapters:
        return Reason("adapters are disabled", expected=True)
    if layer.merged:
        return Reason("adapters are merged", expected=True)
    base = layer.base_layer
    if _torch.hooked(base):
        return Reason("a hook on base_layer")
    if isinstance(base, nn.Embedding):
        if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
            return Reason("its embedding has max_norm, scale_grad_by_freq or sparse gradients")
    elif type(base) is not nn.Linear:
        return Reason(f"base layer is {type(base).__name__}")
    if not peft.plain(base.weight) or base.weight.dtype not in peft.FLOATS:
        return Reason("base weight is quantised or sharded")
    names = [name for name in layer.active_adapters if name in layer.token_indices]
    if len(names) != len(layer.active_adapters):
        return Reason("an active adapter has no tokens here")
    indices = [index for name in names for index in layer.token_indices[name]]
    if len(set(indices)) != len(indices) or not indices:
        return Reason("token indices are repeated or missing")
    if min(indices) < 0 or max(indices) >= base.weight.shape[0]:
        return Reason("a token index is negative or too large")
    if any(not peft.plain(layer.trainable_tokens_delta[name]) for name in names):
        return Reason("adapter weights are sharded")
    return None


def rows_and_indices(layer: Any) -> tuple[Tensor, list[int]]:
    """The trained rows [k, D] of the active adapters and their token ids."""
    names = layer.active_adapters
    rows = [layer.trainable_tokens_delta[name] for name in names]
    indices = [index for name in names for index in layer.token_indices[name]]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)), indices

"""PEFT's LoRA on embeddings (``lora.Embedding``) as fasttune sees it.

Read from PEFT 0.21 (``peft/tuners/lora/layer.py``); tests/integrations/test_private_names.py fails
loudly when it moves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fasttune import _torch
from fasttune.integrations import peft
from fasttune.ops import LoraBranch
from fasttune.reason import Reason


def is_embedding(layer_class: type[nn.Module]) -> bool:
    """True for exactly PEFT's LoRA Embedding."""
    from peft.tuners.lora.layer import Embedding

    return layer_class is Embedding


def static_reason(layer: Any) -> Reason | None:
    """Why a LoRA Embedding can never be fused as it is built, or None."""
    for adapter in layer.lora_embedding_A:
        if adapter in layer.lora_variant:
            return Reason(f"LoRA variant {type(layer.lora_variant[adapter]).__name__}")
    if layer.tp_layer is not None:
        return Reason("the embedding is split by tensor parallelism")
    return None


def why_original(
    layer: Any, ids: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Reason | None:
    """Why this call of a LoRA Embedding takes PEFT's own forward, or None if it can be fused."""
    if layer.disable_adapters:
        return Reason("adapters are disabled", expected=True)
    if layer.merged:
        return Reason("adapters are merged", expected=True)
    if args or any(value is not None for value in kwargs.values()):
        return Reason("called with extra arguments")
    if not layer.training and not torch.is_grad_enabled():
        return Reason("inference", expected=True)
    if type(ids) is not Tensor:
        return Reason(f"input is {type(ids).__name__}, not a plain tensor")
    if ids.dtype not in (torch.int32, torch.int64):
        return Reason(f"input is {ids.dtype}")
    if torch_module._has_any_global_hook():
        return Reason("a global module hook is registered")
    if _torch.in_functorch():
        return Reason("called inside torch.func")
    return static_reason(layer) or _why_base(layer) or _why_factors(layer, ids)


def _why_base(layer: Any) -> Reason | None:
    base = layer.get_base_layer()
    if not isinstance(base, nn.Embedding):
        return Reason(f"base layer is {type(base).__name__}")
    # PEFT applies them to the factor A as well; max_norm changes it in place.
    if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
        return Reason("its embedding has max_norm, scale_grad_by_freq or sparse gradients")
    return None


def _why_factors(layer: Any, ids: Tensor) -> Reason | None:
    names = active(layer)
    if not names:
        return Reason(peft.NO_ADAPTER, expected=True)
    dtypes = set()
    for name in names:
        a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        if not peft.plain(a) or not peft.plain(b):
            return Reason("adapter weights are sharded")
        if a.dtype not in peft.FLOATS or a.dtype != b.dtype:
            return Reason(f"adapter is {a.dtype} / {b.dtype}")
        outputs, rank = layer.out_features, a.shape[0]
        if a.shape != (rank, layer.in_features) or b.shape != (outputs, rank):
            return Reason(f"factors {tuple(a.shape)} and {tuple(b.shape)} do not fit")
        if a.device != ids.device or b.device != ids.device:
            return Reason(f"adapter on {a.device}, input on {ids.device}")
        if a.shape[0] > peft.LARGEST_RANK:
            return Reason(f"rank {a.shape[0]} is above {peft.LARGEST_RANK}")
        for scale in (layer.scaling[name], peft.embedding_scale(layer)):
            if isinstance(scale, Tensor) and (scale.requires_grad or scale.device != ids.device):
                return Reason("scaling is a trained or remote tensor")
        dtypes.add(a.dtype)
    return Reason("active adapters differ in dtype") if len(dtypes) > 1 else None


def active(layer: Any) -> list[str]:
    """The active adapters that this layer has, in the order PEFT adds them."""
    return [name for name in layer.active_adapters if name in layer.lora_embedding_A]


def branches(layer: Any) -> tuple[LoraBranch, ...]:
    """The active adapters, each with its scaling times that of the embedding (Gemma's)."""
    scale = peft.embedding_scale(layer)
    return tuple(
        LoraBranch(
            layer.lora_embedding_A[name],
            layer.lora_embedding_B[name],
            _product(layer.scaling[name], scale, layer.lora_embedding_B[name]),
        )
        for name in active(layer)
    )


def _product(scaling: float | Tensor, scale: Tensor | None, b: Tensor) -> float | Tensor:
    if scale is None:
        return scaling
    dtype = _torch.autocast_dtype(b.device.type) or b.dtype  # of what PEFT multiplies
    return scale.detach().to(dtype).float().reshape(()) * scaling


def padding_idx(layer: Any) -> int | None:
    """The id whose row of A gets no gradient."""
    index: int | None = layer.get_base_layer().padding_idx
    return index

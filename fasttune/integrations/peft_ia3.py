"""PEFT's (IA)^3 layers as fasttune sees them. The only file that reads their attributes.

Read from PEFT 0.21 (``peft/tuners/ia3/layer.py``, ``bnb.py``);
tests/integrations/test_private_names.py fails loudly when it moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fasttune import _torch
from fasttune.integrations import peft
from fasttune.reason import Reason


def ia3_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every (IA)^3 layer of any type in the model."""
    for name, module in peft.other_tuner_layers(model):
        if is_ia3(module):
            yield name, module


def is_ia3(module: nn.Module) -> bool:
    """True for PEFT's (IA)^3 layers of any type."""
    if not peft.loaded():
        return False
    from peft.tuners.ia3.layer import IA3Layer

    return isinstance(module, IA3Layer)


# They convert their input and keep the dtype of the product, unlike Linear.
_BITSANDBYTES = {("peft.tuners.ia3.bnb", "Linear8bitLt"), ("peft.tuners.ia3.bnb", "Linear4bit")}


def is_linear_like(layer_class: type[nn.Module]) -> bool:
    """True for exactly PEFT's (IA)^3 Linear, which Conv1D has too, and its layers on bitsandbytes:
    convolutions have forwards of their own.
    """
    from peft.tuners.ia3.layer import Linear

    return layer_class is Linear or _key(layer_class) in _BITSANDBYTES


def _key(layer_class: type) -> tuple[str, str]:
    return layer_class.__module__, layer_class.__qualname__


def converts(layer: nn.Module) -> bool:
    """True for a layer on bitsandbytes; a swapped class keeps its names."""
    return _key(type(layer)) in _BITSANDBYTES


def converted(layer: nn.Module, x: Tensor) -> Tensor:
    """x as the layer uses it: in fp32 around a base of bitsandbytes outside autocast."""
    return x.float() if converts(layer) and not torch.is_autocast_enabled() else x


def scales_input(layer: Any) -> bool:
    """True where the vector multiplies the input of the base layer, False for its output."""
    return bool(layer.is_feedforward)


def why_original(layer: Any, x: Tensor) -> Reason | None:
    """Why a call with the plain tensor x takes PEFT's own forward, or None if it can be fused."""
    if layer.disable_adapters:
        return Reason("adapters are disabled", expected=True)
    if layer.merged:
        return Reason("adapters are merged", expected=True)
    vectors = active_vectors(layer)
    if not vectors:
        return Reason(peft.NO_ADAPTER, expected=True)
    first = next(iter(vectors.values()))
    for vector in vectors.values():
        if type(vector) not in (Tensor, nn.Parameter):
            return Reason("adapter weights are sharded")
        if vector.dtype not in peft.FLOATS or vector.device != x.device:
            return Reason(f"adapter is {vector.dtype} on {vector.device}, input on {x.device}")
        if vector.dtype != first.dtype:
            return Reason("active adapters differ in dtype")
    if x.dim() == 0 or x.shape[-1] != layer.in_features:
        return Reason(f"input shape {tuple(x.shape)} does not fit the weight")
    if not scales_input(layer):
        return None
    given = converted(layer, x).dtype
    wider = torch.promote_types(given, first.dtype)
    if converts(layer):
        return None if wider == given else Reason(f"PEFT passes {wider} to its base layer")
    if wider != first.dtype:
        return Reason(f"PEFT rounds an input of {x.dtype} to the adapter's {first.dtype}")
    return None


def active_vectors(layer: Any) -> dict[str, Tensor]:
    """The vectors of the active adapters that this layer has, as PEFT stores them, in order."""
    return {name: layer.ia3_l[name] for name in layer.active_adapters if name in layer.ia3_l}


def scale(vectors: list[Tensor]) -> Tensor:
    """The product [N] of the vectors of several adapters, rounded as PEFT does."""
    product = vectors[0].flatten()
    for vector in vectors[1:]:
        product = product * vector.flatten()
    return product


def trained_weight(layer: Any, x: Tensor) -> Tensor | None:
    """The weight [N, K] of a plain base layer that is trained itself and fits x, or None."""
    weight = peft.plain_weight(layer)
    if weight is None or not weight.requires_grad or torch_module._has_any_global_hook():
        return None
    fits = weight.dtype == x.dtype or _torch.autocast_dtype(x.device.type) is not None
    return weight if fits and weight.device == x.device else None

"""PEFT's VeRA and AdaLoRA layers as LoRA with scaled ranks and outputs. The only file that reads
their attributes.

    VeRA     y += lambda_b (lambda_d (x A^T) B^T)        A and B frozen, shared by all layers
    AdaLoRA  y += scaling / (ranknum + 1e-5) x (E A)^T B^T

Read from PEFT 0.21 (``peft/tuners/vera/layer.py``, ``adalora/layer.py``);
tests/integrations/test_private_names.py fails loudly when it moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fasttune import _torch
from fasttune.integrations import peft, peft_linear
from fasttune.ops import LoraBranch, LoraProjection
from fasttune.reason import Reason

_VERA = ("peft.tuners.vera.layer", "Linear")
_ADALORA = ("peft.tuners.adalora.layer", "SVDLinear")
_TITLES = {"vera": "VeRA", "adalora": "AdaLoRA"}
_RANKNUM_EPS = 1e-5


def lowrank_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every VeRA and AdaLoRA layer of any type in the model."""
    for name, module in model.named_modules():
        if is_lowrank(module):
            yield name, module


def is_lowrank(module: nn.Module) -> bool:
    """True for PEFT's VeRA and AdaLoRA layers of any type."""
    if not peft.loaded():
        return False
    from peft.tuners.adalora.layer import AdaLoraLayer
    from peft.tuners.vera.layer import VeraLayer

    return isinstance(module, (AdaLoraLayer, VeraLayer))


def is_linear_like(layer_class: type[nn.Module]) -> bool:
    """True for exactly the layers whose output is that of their base plus the branches; AdaLoRA's
    around quantised bases and convolutions have forwards of their own.
    """
    return _key(layer_class) in (_VERA, _ADALORA)


def _key(layer_class: type) -> tuple[str, str]:
    return layer_class.__module__, layer_class.__qualname__


def _is_vera(layer: nn.Module) -> bool:
    return _key(type(layer)) == _VERA  # a swapped class keeps its names


def title(layer: nn.Module) -> str:
    """The method as it is written: "VeRA"."""
    return _TITLES[peft.method_of(layer)]


def returns_input_dtype(layer: nn.Module) -> bool:
    """True for VeRA, which ends in a cast to the dtype of x, under autocast too."""
    return _is_vera(layer)


def why_original(layer: Any, x: Tensor) -> Reason | None:
    """Why a call with the plain tensor x takes PEFT's own forward, or None if it can be fused."""
    if layer.disable_adapters:
        return Reason("adapters are disabled", expected=True)
    if layer.merged:
        return Reason("adapters are merged", expected=True)
    if torch_module._has_any_global_hook():
        return Reason("a global module hook is registered")
    return peft_linear.why_base(layer, x) or _why_adapters(layer, x)


def _why_adapters(layer: Any, x: Tensor) -> Reason | None:
    dtypes: set[torch.dtype] = set()
    for adapter in _active(layer):
        tensors = _tensors(layer, adapter)
        a, b = tensors[:2]
        dropout = dropouts(layer)[adapter]
        reason = peft_linear.why_tensors(tensors, x) or peft_linear.why_dropout(dropout)
        if reason is not None:
            return reason
        if peft.hooked(dropout):
            return Reason(f"a hook on the dropout of {adapter!r}")
        if not 0 < a.shape[0] <= peft.LARGEST_RANK or a.shape[0] != b.shape[1]:
            return Reason(f"rank {a.shape[0]} / {b.shape[1]} is not in 1 ... {peft.LARGEST_RANK}")
        dtypes.update(tensor.dtype for tensor in tensors)
    if not dtypes:
        return Reason(peft.NO_ADAPTER, expected=True)
    if len(dtypes) > 1:
        return Reason("active adapters differ in dtype")
    casts = getattr(layer, "cast_input_dtype_enabled", True)
    if not casts and dtypes != {x.dtype} and _torch.autocast_dtype(x.device.type) is None:
        return Reason("input casting is disabled and the adapter has another dtype")
    return None


def _active(layer: Any) -> list[str]:
    known = layer.vera_lambda_d if _is_vera(layer) else layer.lora_A
    return [adapter for adapter in layer.active_adapters if adapter in known]


def _tensors(layer: Any, adapter: str) -> list[Tensor]:
    """A, B and what scales them, as PEFT stores them."""
    if _is_vera(layer):
        groups = (layer.vera_A, layer.vera_B, layer.vera_lambda_d, layer.vera_lambda_b)
    else:
        groups = (layer.lora_A, layer.lora_B, layer.lora_E, layer.ranknum)
    return [group[adapter] for group in groups]


def dropouts(layer: Any) -> nn.ModuleDict:
    """The dropout of every adapter."""
    modules: nn.ModuleDict = layer.vera_dropout if _is_vera(layer) else layer.lora_dropout
    return modules


def projection(layer: Any, x: Tensor) -> LoraProjection:
    """The base layer and the active adapters, in the order PEFT adds them.

    A base whose own forward must run is run here, on x.
    """
    weight = peft.plain_weight(layer)
    if weight is None:
        return LoraProjection(None, None, branches(layer), base=layer.base_layer(x))
    return LoraProjection(weight, layer.base_layer.bias, branches(layer))


def branches(layer: Any) -> tuple[LoraBranch, ...]:
    """The active adapters, in the order PEFT adds them."""
    return tuple(_branch(layer, adapter) for adapter in _active(layer))


def _branch(layer: Any, adapter: str) -> LoraBranch:
    a, b, rank_scale, last = _tensors(layer, adapter)
    p = peft_linear.dropout_p(dropouts(layer)[adapter])
    if _is_vera(layer):
        a, b = a[:, : layer.in_features], b[: layer.out_features]
        return LoraBranch(a, b, 1.0, None, p, rank_scale=rank_scale, out_scale=last)
    # PEFT trains ranknum where it has cast the adapter: its gradient goes through these R numbers.
    scaling = layer.scaling[adapter] / (last.float() + _RANKNUM_EPS)
    return LoraBranch(a, b, 1.0, None, p, rank_scale=rank_scale.float().flatten() * scaling)

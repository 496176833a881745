"""PEFT's LoRA layers as fasttune sees them. The only file that reads PEFT's attributes.

Read from PEFT 0.21 (``peft/tuners/lora/layer.py``); tests/integrations/test_peft.py fails loudly
when it moves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fasttune import _torch
from fasttune.ops import LoraBranch, LoraProjection
from fasttune.reason import Reason

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_RANK = 256  # of every backend
_LARGEST_P = 0.9999  # beyond, a 16-bit threshold keeps nothing
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def loaded() -> bool:
    """True if PEFT has been imported: else no model can have its layers."""
    return "peft" in sys.modules


def lora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every LoRA layer of any type in the model, injected by PEFT, transformers or diffusers."""
    if not loaded():
        return
    from peft.tuners.lora.layer import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def other_tuner_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """PEFT layers of other methods than LoRA."""
    if not loaded():
        return
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            yield name, module


def is_linear(layer_class: type[nn.Module]) -> bool:
    """True for exactly PEFT's LoRA Linear: its subclasses have forwards of their own."""
    from peft.tuners.lora.layer import Linear

    return layer_class is Linear


def is_modules_to_save(module: nn.Module) -> bool:
    """True for PEFT's wrapper of fully trained modules."""
    if not loaded():
        return False
    from peft.utils.other import ModulesToSaveWrapper

    return isinstance(module, ModulesToSaveWrapper)


def saved_module(module: Any) -> nn.Module | None:
    """The module that a ModulesToSaveWrapper runs now, or None if that is not one plain module."""
    if module.disable_adapters:
        active: nn.Module = module.original_module
        return active
    names = module.active_adapters
    if len(names) != 1 or names[0] not in module.modules_to_save:
        return module.original_module if not names else None
    chosen: nn.Module = module.modules_to_save[names[0]]
    return chosen


def injected_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters injected into the model, cheap enough for every forward."""
    config = model.__dict__.get("peft_config")
    return tuple(config) if isinstance(config, dict) else ()


def hooked(module: nn.Module) -> bool:
    """True if a call of the module does more than its class's forward."""
    state = module.__dict__
    if "forward" in state or "_hf_hook" in state:
        return True
    return any(state.get(name) for name in _HOOKS)


def static_reason(layer: Any) -> Reason | None:
    """Why a LoRA Linear can never be fused as it is built, or None."""
    base = layer.base_layer
    if type(base) is not nn.Linear:
        return Reason(f"base layer is {type(base).__name__}, not nn.Linear")
    for adapter in layer.lora_A:
        if adapter in layer.lora_variant:
            return Reason(f"LoRA variant {type(layer.lora_variant[adapter]).__name__}")
    return None


def why_original(
    layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Reason | None:
    """Why this call of a LoRA Linear takes PEFT's own forward, or None if it can be fused."""
    if torch.compiler.is_compiling():
        return Reason("torch.compile traces PEFT's own forward", expected=True)
    if layer.disable_adapters:
        return Reason("adapters are disabled", expected=True)
    if layer.merged:
        return Reason("adapters are merged", expected=True)
    if args or any(value is not None for value in kwargs.values()):
        return Reason("called with extra arguments")
    if not layer.training and not torch.is_grad_enabled():
        return Reason("inference", expected=True)
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return Reason(f"input is {type(x).__name__}, not a plain tensor")
    if torch_module._has_any_global_hook():
        return Reason("a global module hook is registered")
    if _torch.in_functorch():
        return Reason("called inside torch.func")
    return _why_base(layer, x) or _why_adapters(layer, x)


def _why_base(layer: Any, x: Tensor) -> Reason | None:
    base = layer.base_layer
    if type(base) is not nn.Linear:
        return Reason(f"base layer is {type(base).__name__}, not nn.Linear")
    if hooked(base):
        return Reason("a hook on base_layer")
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if weight is None or not _plain(weight) or (bias is not None and not _plain(bias)):
        return Reason("base weight is quantised or sharded")
    if weight.dtype not in _FLOATS or x.dtype not in _FLOATS:
        return Reason(f"dtype {x.dtype} with weight {weight.dtype}")
    if x.device != weight.device:
        return Reason(f"input on {x.device}, weight on {weight.device}")
    if x.dtype != weight.dtype and _torch.autocast_dtype(x.device.type) is None:
        return Reason(f"input is {x.dtype} and weight {weight.dtype} outside autocast")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return Reason(f"input shape {tuple(x.shape)} does not fit the weight")
    return None


def _why_adapters(layer: Any, x: Tensor, adapters: Sequence[str] | None = None) -> Reason | None:
    reason = why_factors(layer, adapters)
    if reason is not None:
        return reason
    casts = getattr(layer, "cast_input_dtype_enabled", True)
    autocast = _torch.autocast_dtype(x.device.type)
    for adapter in active(layer) if adapters is None else adapters:
        a = layer.lora_A[adapter]._parameters.get("weight")
        if a.device != x.device:
            return Reason(f"adapter on {a.device}, input on {x.device}")
        if not casts and a.dtype != x.dtype and autocast is None:
            return Reason("input casting is disabled and the adapter has another dtype")
    return None


def base_weight(layer: nn.Module) -> Tensor | None:
    """The weight of the base layer without nn.Module's slow attribute path, None if it has none."""
    base = layer._modules.get("base_layer")
    return None if base is None else base._parameters.get("weight")


def active(layer: Any) -> list[str]:
    """The active adapters that this layer has, in the order PEFT adds them."""
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


def why_factors(layer: Any, adapters: Sequence[str] | None = None) -> Reason | None:
    """Why adapters of a LoRA Linear, the active ones if None, cannot be fused, whatever its input;
    None if they can.
    """
    dtypes = set()
    for adapter in active(layer) if adapters is None else adapters:
        if adapter in layer.lora_variant:
            return Reason(f"LoRA variant {type(layer.lora_variant[adapter]).__name__}")
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        dropout = layer.lora_dropout[adapter]
        if type(down) is not nn.Linear or type(up) is not nn.Linear:
            return Reason(f"lora_A is {type(down).__name__}, not nn.Linear")
        if type(dropout) is not nn.Dropout and type(dropout) is not nn.Identity:
            return Reason(f"dropout is {type(dropout).__name__}")
        for name, module in (("lora_A", down), ("lora_B", up), ("lora_dropout", dropout)):
            if hooked(module):
                return Reason(f"a hook on {name}[{adapter!r}]")
        a, b = down._parameters.get("weight"), up._parameters.get("weight")
        if a is None or b is None or not _plain(a) or not _plain(b):
            return Reason("adapter weights are sharded")
        if a.dtype not in _FLOATS or a.dtype != b.dtype or a.device != b.device:
            return Reason(f"adapter is {a.dtype} / {b.dtype} on {a.device} / {b.device}")
        scaling = layer.scaling[adapter]
        if isinstance(scaling, Tensor) and (
            scaling.requires_grad or scaling.dim() or scaling.device != a.device
        ):
            return Reason("scaling is a trained or remote tensor")
        if type(dropout) is nn.Dropout and dropout.training and not 0.0 <= dropout.p < _LARGEST_P:
            return Reason(f"dropout probability {dropout.p}")
        if a.shape[0] > _LARGEST_RANK:
            return Reason(f"rank {a.shape[0]} is above {_LARGEST_RANK}")
        dtypes.add(a.dtype)
    if not dtypes:
        return Reason("no active adapter on this layer", expected=True)
    return Reason("active adapters differ in dtype") if len(dtypes) > 1 else None


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def projection(layer: Any) -> LoraProjection:
    """The base layer and the active adapters of a LoRA Linear, in the order PEFT adds them."""
    base = layer.base_layer
    branches = tuple(branch(layer, adapter) for adapter in active(layer))
    return LoraProjection(base.weight, base.bias, branches)


def branch(layer: Any, adapter: str) -> LoraBranch:
    """One adapter of a LoRA Linear, with the dropout that is in force."""
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    dropout = layer.lora_dropout[adapter]
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    scaling, bias = layer.scaling[adapter], up._parameters.get("bias")
    return LoraBranch(down.weight, up.weight, scaling, bias, p)


# ---------------------------------------------------------------------------- mixed batches

BASE = "__base__"  # PEFT's name for samples without an adapter


def check_forward_args(layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """PEFT's own errors about ``adapter_names``."""
    layer._check_forward_args(x, *args, **kwargs)


def adapters_of(layer: Any) -> set[str]:
    """The adapters that a LoRA layer of any type has."""
    return {*layer.lora_A, *layer.lora_embedding_A}


def is_disabled(layer: Any) -> bool:
    """True if the layer computes its base layer only."""
    return bool(layer.disable_adapters)


def is_merged(layer: Any) -> bool:
    """True if an adapter is merged into the base weight."""
    return bool(layer.merged)


def active_names(layer: Any) -> set[str]:
    """The active adapters, whether or not this layer has them."""
    return set(layer.active_adapters)


def trains(layer: Any, adapter: str) -> bool:
    """True if a parameter of the adapter's factors requires a gradient."""
    factors = [group[adapter] for group in (layer.lora_A, layer.lora_B) if adapter in group]
    return any(p.requires_grad for factor in factors for p in factor.parameters())


def copies_of_modules(model: nn.Module) -> Iterator[tuple[str, set[str]]]:
    """(name, adapters) of modules_to_save and trainable tokens: modules that an adapter replaces
    for the whole batch.
    """
    if not loaded():
        return
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield name, set(module._adapters)


def why_not_mixed(layer: Any, x: Any, adapters: Sequence[str]) -> Reason | None:
    """Why a call of a LoRA Linear cannot give each sample one of ``adapters``, or None."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return Reason(f"input is {type(x).__name__}, not a plain tensor")
    if x.dim() < 2:
        return Reason(f"input has no samples: its shape is {tuple(x.shape)}")
    if torch_module._has_any_global_hook():
        return Reason("a global module hook is registered")
    if _torch.in_functorch():
        return Reason("called inside torch.func")
    reason = _why_base(layer, x)
    for adapter in adapters:
        reason = reason or _why_adapters(layer, x, [adapter])
    return reason


def mixed_branches(layer: Any, names: Sequence[str]) -> tuple[LoraProjection, list[str], list[int]]:
    """The base layer with a branch for each adapter in ``names`` that the layer has, the names of
    the branches, and for each entry of ``names`` its branch or -1.
    """
    own = [name for name in dict.fromkeys(names) if name != BASE and name in layer.lora_A]
    base = layer.base_layer
    branches = tuple(branch(layer, adapter) for adapter in own)
    place = {adapter: index for index, adapter in enumerate(own)}
    rows_of = [place.get(name, -1) for name in names]
    return LoraProjection(base.weight, base.bias, branches), own, rows_of

"""PEFT's LoRA layers as fasttune sees them. The only file that reads PEFT's attributes.

Read from PEFT 0.21 (``peft/tuners/lora/layer.py``); tests/integrations/test_private_names.py fails
loudly when it moves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fasttune import _torch
from fasttune.ops import LoraBranch, LoraProjection
from fasttune.reason import Reason

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_RANK = 256  # of every backend
_LARGEST_P = 0.9999  # beyond, a 16-bit threshold keeps nothing
NO_ADAPTER = "no active adapter on this layer"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def loaded() -> bool:
    """True if PEFT has been imported: else no model can have its layers."""
    return "peft" in sys.modules


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel; any other model itself."""
    if not loaded():
        return model
    from peft import PeftMixedModel, PeftModel

    if isinstance(model, PeftMixedModel):
        return cast("nn.Module", model.base_model.model)
    return cast("nn.Module", model.get_base_model()) if isinstance(model, PeftModel) else model


def has_layers(model: nn.Module) -> bool:
    """True if PEFT has injected layers of any method."""
    if not loaded():
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def lora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every LoRA layer of any type in the model, injected by PEFT, transformers or diffusers."""
    if not loaded():
        return
    from peft.tuners.lora.layer import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def other_tuner_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """PEFT layers of other methods than LoRA and trainable tokens."""
    if not loaded():
        return
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        known = isinstance(module, (LoraLayer, TrainableTokensLayer))
        if isinstance(module, BaseTunerLayer) and not known:
            yield name, module


def method_of(layer: nn.Module) -> str:
    """The name of the method that a PEFT layer belongs to, as its package has it: "vera"."""
    for base in type(layer).__mro__:
        parts = base.__module__.split(".")
        if parts[:2] == ["peft", "tuners"]:
            return parts[2]
    return type(layer).__name__


# Layers that run a quantised base and then add the branches as lora.Linear does: read and tested
# one by one, because their forwards differ in details.
_QUANTISED = {
    *{("peft.tuners.lora.bnb", "Linear8bitLt"), ("peft.tuners.lora.bnb", "Linear4bit")},
    *{("peft.tuners.lora.torchao", "TorchaoLoraLinear"), ("peft.tuners.lora.hqq", "HqqLoraLinear")},
    *{("peft.tuners.lora.gptq", "GPTQLoraLinear"), ("peft.tuners.lora.awq", "AwqLoraLinear")},
    *{("peft.tuners.lora.aqlm", "AqlmLoraLinear"), ("peft.tuners.lora.eetq", "EetqLoraLinear")},
}


def is_linear(layer_class: type[nn.Module]) -> bool:
    """True for exactly PEFT's LoRA Linear: its subclasses have forwards of their own."""
    from peft.tuners.lora.layer import Linear

    return layer_class is Linear


def is_linear_like(layer_class: type[nn.Module]) -> bool:
    """True for the LoRA layers whose output is that of their base plus the branches."""
    return is_linear(layer_class) or (
        (layer_class.__module__, layer_class.__qualname__) in _QUANTISED
    )


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
    for adapter in layer.lora_A:
        if adapter in layer.lora_variant and not _is_dora(layer, adapter):
            return Reason(f"LoRA variant {type(layer.lora_variant[adapter]).__name__}")
    return None


def _is_dora(layer: Any, adapter: str) -> bool:
    from peft.tuners.lora.variants import DoraLinearVariant

    return type(layer.lora_variant.get(adapter)) is DoraLinearVariant


def dora_adapter(layer: Any) -> str | None:
    """The one active adapter of a LoRA Linear if it is DoRA, else None."""
    if not layer.lora_variant:
        return None
    names = active(layer)
    return names[0] if len(names) == 1 and _is_dora(layer, names[0]) else None


def why_dora_original(layer: Any, adapter: str, x: Tensor) -> Reason | None:
    """Why a DoRA adapter cannot be fused in this call, after :func:`why_original` had no reason."""
    magnitude = layer.lora_magnitude_vector[adapter]
    if hooked(magnitude):
        return Reason(f"a hook on lora_magnitude_vector[{adapter!r}]")
    if plain_weight(layer) is None:
        return Reason("DoRA on a base whose own forward must run")
    if not _plain(magnitude.weight) or magnitude.weight.device != x.device:
        return Reason("the magnitude is sharded or on another device")
    if isinstance(layer.scaling[adapter], Tensor):
        return Reason("DoRA with a tensor as scaling")
    if x.dim() == 1:  # PEFT returns [1, N] then
        return Reason("DoRA of one vector")
    return None


def has_dropout(layer: Any, adapter: str) -> bool:
    """True if an adapter has a dropout module, whether or not it drops now."""
    return type(layer.lora_dropout[adapter]) is not nn.Identity


def magnitude(layer: Any, adapter: str) -> Tensor:
    """The magnitude [N] of a DoRA adapter."""
    weight: Tensor = layer.lora_magnitude_vector[adapter].weight
    return weight


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
    return why_base(layer, x) or _why_adapters(layer, x)


def why_base(layer: Any, x: Tensor) -> Reason | None:
    """Why x does not fit the base layer of a low-rank layer of any method, or None."""
    if x.dtype not in _FLOATS:
        return Reason(f"input is {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != layer.in_features:
        return Reason(f"input shape {tuple(x.shape)} does not fit the weight")
    weight = plain_weight(layer)
    if weight is None:
        return None
    if x.device != weight.device:
        return Reason(f"input on {x.device}, weight on {weight.device}")
    if x.dtype != weight.dtype and _torch.autocast_dtype(x.device.type) is None:
        return Reason(f"input is {x.dtype} and weight {weight.dtype} outside autocast")
    return None


def plain_weight(layer: Any) -> Tensor | None:
    """The weight [N, K] of a base layer that is x W^T + bias and nothing else, or None: then its
    own forward must run (quantised, sharded, hooked, offloaded, or a class of its own).
    """
    base = layer._modules["base_layer"]
    conv1d = type(base) is _conv1d()
    if (type(base) is not nn.Linear and not conv1d) or hooked(base):
        return None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if weight is None or not _plain(weight) or (bias is not None and not _plain(bias)):
        return None
    if weight.dtype not in _FLOATS or weight.shape[int(not conv1d)] != layer.in_features:
        return None
    plain: Tensor = weight.t() if conv1d else weight
    return plain


@lru_cache(maxsize=1)
def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    layer: type[nn.Module] = Conv1D
    return layer


def _why_adapters(layer: Any, x: Tensor, adapters: Sequence[str] | None = None) -> Reason | None:
    reason = why_factors(layer, adapters, dora=adapters is None)
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


def active(layer: Any) -> list[str]:
    """The active adapters that this layer has, in the order PEFT adds them."""
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


def why_factors(
    layer: Any, adapters: Sequence[str] | None = None, *, dora: bool = False
) -> Reason | None:
    """Why adapters of a LoRA Linear, the active ones if None, cannot be fused, whatever its input;
    None if they can. ``dora``: the caller knows what to do with one DoRA adapter.
    """
    dtypes = set()
    known = dora_adapter(layer) if dora else None
    for adapter in active(layer) if adapters is None else adapters:
        if adapter in layer.lora_variant and adapter != known:
            return Reason(f"LoRA variant {type(layer.lora_variant[adapter]).__name__}")
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        dropout = layer.lora_dropout[adapter]
        if type(down) is not nn.Linear or type(up) is not nn.Linear:
            return Reason(f"lora_A is {type(down).__name__}, not nn.Linear")
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
        reason = why_dropout(dropout)
        if reason is not None:
            return reason
        if a.shape[0] > LARGEST_RANK:
            return Reason(f"rank {a.shape[0]} is above {LARGEST_RANK}")
        dtypes.add(a.dtype)
    if not dtypes:
        return Reason(NO_ADAPTER, expected=True)
    return Reason("active adapters differ in dtype") if len(dtypes) > 1 else None


def why_dropout(dropout: nn.Module) -> Reason | None:
    """Why the dropout of an adapter cannot be drawn by a kernel, or None."""
    if type(dropout) is not nn.Dropout and type(dropout) is not nn.Identity:
        return Reason(f"dropout is {type(dropout).__name__}")
    if type(dropout) is nn.Dropout and dropout.training and not 0.0 <= dropout.p < _LARGEST_P:
        return Reason(f"dropout probability {dropout.p}")
    return None


def dropout_p(dropout: nn.Module) -> float:
    """The probability that is in force."""
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def why_tensors(tensors: Iterable[Tensor], x: Tensor) -> Reason | None:
    """Why the tensors of an adapter cannot meet the input x in a kernel, or None."""
    for tensor in tensors:
        if not _plain(tensor):
            return Reason("adapter weights are sharded")
        if tensor.dtype not in _FLOATS or tensor.device != x.device:
            return Reason(f"adapter is {tensor.dtype} on {tensor.device}, input on {x.device}")
    return None


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def projection(layer: Any, x: Tensor) -> LoraProjection:
    """The base layer and the active adapters of a LoRA Linear, in the order PEFT adds them.

    A base whose own forward must run is run here, on x.
    """
    weight = plain_weight(layer)
    if weight is None:
        return LoraProjection(None, None, branches(layer), base=layer.base_layer(x))
    return LoraProjection(weight, layer.base_layer.bias, branches(layer))


def branches(layer: Any) -> tuple[LoraBranch, ...]:
    """The active adapters of a LoRA Linear, in the order PEFT adds them."""
    return tuple(branch(layer, adapter) for adapter in active(layer))


def branch(layer: Any, adapter: str) -> LoraBranch:
    """One adapter of a LoRA Linear, with the dropout that is in force."""
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    p = dropout_p(layer.lora_dropout[adapter])
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
    reason = why_base(layer, x)
    if plain_weight(layer) is None:
        reason = reason or Reason("its base layer's own forward must run: quantised or hooked")
    for adapter in adapters:
        reason = reason or _why_adapters(layer, x, [adapter])
    return reason


def mixed_branches(layer: Any, names: Sequence[str]) -> tuple[LoraProjection, list[str], list[int]]:
    """The base layer with a branch for each adapter in ``names`` that the layer has, the names of
    the branches, and for each entry of ``names`` its branch or -1.
    """
    own = [name for name in dict.fromkeys(names) if name != BASE and name in layer.lora_A]
    branches = tuple(branch(layer, adapter) for adapter in own)
    place = {adapter: index for index, adapter in enumerate(own)}
    rows_of = [place.get(name, -1) for name in names]
    return LoraProjection(plain_weight(layer), layer.base_layer.bias, branches), own, rows_of


# ---------------------------------------------------------------------------- trainable tokens


def trainable_token_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer of trainable tokens in the model."""
    if not loaded():
        return
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensLayer):
            yield name, module


def why_tokens_original(layer: Any) -> Reason | None:
    """Why a layer of trainable tokens takes PEFT's own forward now, or None."""
    if layer.disable_adapters or not layer.active_adapters:
        return Reason("adapters are disabled", expected=True)
    if layer.merged:
        return Reason("adapters are merged", expected=True)
    base = layer.base_layer
    if hooked(base):
        return Reason("a hook on base_layer")
    if isinstance(base, nn.Embedding):
        if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
            return Reason("its embedding has max_norm, scale_grad_by_freq or sparse gradients")
    elif type(base) is not nn.Linear:
        return Reason(f"base layer is {type(base).__name__}")
    if not _plain(base.weight) or base.weight.dtype not in _FLOATS:
        return Reason("base weight is quantised or sharded")
    names = [name for name in layer.active_adapters if name in layer.token_indices]
    if len(names) != len(layer.active_adapters):
        return Reason("an active adapter has no tokens here")
    indices = [index for name in names for index in layer.token_indices[name]]
    if len(set(indices)) != len(indices) or not indices:
        return Reason("token indices are repeated or missing")
    if min(indices) < 0 or max(indices) >= base.weight.shape[0]:
        return Reason("a token index is negative or too large")
    if any(not _plain(layer.trainable_tokens_delta[name]) for name in names):
        return Reason("adapter weights are sharded")
    return None


def token_rows(layer: Any) -> tuple[Tensor, list[int]]:
    """The trained rows [k, D] of the active adapters and their token ids."""
    names = layer.active_adapters
    rows = [layer.trainable_tokens_delta[name] for name in names]
    indices = [index for name in names for index in layer.token_indices[name]]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)), indices


def embedding_scale(layer: Any) -> Tensor | None:
    """What some embeddings multiply their output by, or None."""
    scale: Tensor | None = layer._get_embed_scale()
    return scale

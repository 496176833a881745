"""PEFT's LoRA on linear layers as fasttune sees it; DoRA's own part is in peft_dora.py.

Read from PEFT 0.21 (``peft/tuners/lora/layer.py``); tests/integrations/test_private_names.py fails
loudly when it moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fasttune import _torch
from fasttune.integrations import peft, peft_dora
from fasttune.ops import LoraBranch, LoraProjection
from fasttune.reason import Reason

_LARGEST_P = 0.9999  # beyond, a 16-bit threshold keeps nothing

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


def static_reason(layer: Any) -> Reason | None:
    """Why a LoRA Linear can never be fused as it is built, or None."""
    for adapter in layer.lora_A:
        if adapter in layer.lora_variant and not peft_dora.is_dora(layer, adapter):
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
    return why_call(layer, x, args, kwargs) or why_base(layer, x) or why_adapters(layer, x)


def why_call(layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reason | None:
    """Why a call takes PEFT's own forward whatever the layer's adapters, or None."""
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
    return None


def why_base(layer: Any, x: Tensor) -> Reason | None:
    """Why an input does not fit the base of a LoRA Linear, or None."""
    if x.dtype not in peft.FLOATS:
        return Reason(f"input is {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != layer.in_features:
        return Reason(f"input shape {tuple(x.shape)} does not fit the weight")
    weight = peft.plain_weight(layer)
    if weight is None:
        return None
    if x.device != weight.device:
        return Reason(f"input on {x.device}, weight on {weight.device}")
    if x.dtype != weight.dtype and _torch.autocast_dtype(x.device.type) is None:
        return Reason(f"input is {x.dtype} and weight {weight.dtype} outside autocast")
    return None


def why_adapters(layer: Any, x: Tensor, adapters: Sequence[str] | None = None) -> Reason | None:
    """Why adapters, the active ones if None, cannot be fused for this input, or None."""
    reason = why_factors(layer, adapters, dora=adapters is None)
    if reason is not None:
        return reason
    casts = getattr(layer, "cast_input_dtype_enabled", True)
    autocast = _torch.autocast_dtype(x.device.type)
    for adapter in peft.active(layer) if adapters is None else adapters:
        a = layer.lora_A[adapter]._parameters.get("weight")
        if a.device != x.device:
            return Reason(f"adapter on {a.device}, input on {x.device}")
        if not casts and a.dtype != x.dtype and autocast is None:
            return Reason("input casting is disabled and the adapter has another dtype")
    return None


def why_factors(
    layer: Any, adapters: Sequence[str] | None = None, *, dora: bool = False
) -> Reason | None:
    """Why adapters of a LoRA Linear, the active ones if None, cannot be fused, whatever its input;
    None if they can. ``dora``: the caller knows what to do with one DoRA adapter.
    """
    dtypes = set()
    known = peft_dora.adapter_of(layer) if dora else None
    for adapter in peft.active(layer) if adapters is None else adapters:
        if adapter in layer.lora_variant and adapter != known:
            return Reason(f"LoRA variant {type(layer.lora_variant[adapter]).__name__}")
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        dropout = layer.lora_dropout[adapter]
        if type(down) is not nn.Linear or type(up) is not nn.Linear:
            return Reason(f"lora_A is {type(down).__name__}, not nn.Linear")
        if down._parameters.get("bias") is not None:
            return Reason("lora_A has a bias")
        for name, module in (("lora_A", down), ("lora_B", up), ("lora_dropout", dropout)):
            if _torch.hooked(module):
                return Reason(f"a hook on {name}[{adapter!r}]")
        a, b = down._parameters.get("weight"), up._parameters.get("weight")
        if a is None or b is None or not peft.plain(a) or not peft.plain(b):
            return Reason("adapter weights are sharded")
        if a.dtype not in peft.FLOATS or a.dtype != b.dtype or a.device != b.device:
            return Reason(f"adapter is {a.dtype} / {b.dtype} on {a.device} / {b.device}")
        if not _fit(layer, a, b, up._parameters.get("bias")):
            return Reason(f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit")
        scaling = layer.scaling[adapter]
        if isinstance(scaling, Tensor) and (
            scaling.requires_grad or scaling.dim() or scaling.device != a.device
        ):
            return Reason("scaling is a trained or remote tensor")
        reason = why_dropout(dropout)
        if reason is not None:
            return reason
        if a.shape[0] > peft.LARGEST_RANK:
            return Reason(f"rank {a.shape[0]} is above {peft.LARGEST_RANK}")
        dtypes.add(a.dtype)
    if not dtypes:
        return Reason(peft.NO_ADAPTER, expected=True)
    return Reason("active adapters differ in dtype") if len(dtypes) > 1 else None


def _fit(layer: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    """Whether A is [R, K] and B [N, R]: kernels trust the shapes, and factors can be replaced."""
    outputs, rank = layer.out_features, a.shape[0]
    if a.shape != (rank, layer.in_features) or b.shape != (outputs, rank):
        return False
    return bias is None or bias.shape == (outputs,)


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
        if not peft.plain(tensor):
            return Reason("adapter weights are sharded")
        if tensor.dtype not in peft.FLOATS or tensor.device != x.device:
            return Reason(f"adapter is {tensor.dtype} on {tensor.device}, input on {x.device}")
    return None


def projection(layer: Any, x: Tensor) -> LoraProjection:
    """The base layer and the active adapters of a LoRA Linear, in the order PEFT adds them.

    A base whose own forward must run is run here, on x.
    """
    weight = peft.plain_weight(layer)
    if weight is None:
        return LoraProjection(None, None, branches(layer), base=layer.base_layer(x))
    return LoraProjection(weight, layer.base_layer.bias, branches(layer))


def branches(layer: Any) -> tuple[LoraBranch, ...]:
    """The active adapters of a LoRA Linear, in the order PEFT adds them."""
    return tuple(branch(layer, adapter) for adapter in peft.active(layer))


def branch(layer: Any, adapter: str) -> LoraBranch:
    """One adapter of a LoRA Linear, with the dropout that is in force."""
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    p = dropout_p(layer.lora_dropout[adapter])
    scaling, bias = layer.scaling[adapter], up._parameters.get("bias")
    return LoraBranch(down.weight, up.weight, scaling, bias, p)

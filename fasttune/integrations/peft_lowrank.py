"""PEFT's VeRA, AdaLoRA and DeLoRA layers as LoRA with scaled ranks and outputs. The only file that
reads their attributes.

    VeRA     y += lambda_b (lambda_d (x A^T) B^T)        A and B frozen, shared by all layers
    AdaLoRA  y += scaling / (ranknum + 1e-5) x (E A)^T B^T
    DeLoRA   y += (lambda / (r |A| |B|) ((x w) A^T)) B^T   norms of each rank, w of the base weight

Read from PEFT 0.21 (``peft/tuners/vera/layer.py``, ``adalora/layer.py``, ``delora/layer.py``);
tests/integrations/test_private_names.py fails loudly when it moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fasttune import _torch
from fasttune.integrations import peft, peft_linear
from fasttune.ops import LoraBranch, LoraProjection
from fasttune.reason import Reason


@dataclass(frozen=True)
class _Method:
    """One method as its linear layer has it.

    Attributes:
        title: as it is written.
        tensors: attributes that hold, by adapter, A, B and what scales them.
        dropout: attribute that holds the dropouts.
        branch: (layer, adapter, tensors, dropout's probability) to what is computed.
        casts: the input is cast to the dtype of the adapter.
        returns_input_dtype: the last line casts to the dtype of x, under autocast too.
    """

    title: str
    tensors: tuple[str, ...]
    dropout: str
    branch: Callable[[Any, str, Sequence[Tensor], float], LoraBranch]
    casts: bool
    returns_input_dtype: bool


def _vera(layer: Any, adapter: str, tensors: Sequence[Tensor], p: float) -> LoraBranch:
    a, b, lambda_d, lambda_b = tensors
    a, b = a[:, : layer.in_features], b[: layer.out_features]
    return LoraBranch(a, b, 1.0, None, p, rank_scale=lambda_d, out_scale=lambda_b)


def _adalora(layer: Any, adapter: str, tensors: Sequence[Tensor], p: float) -> LoraBranch:
    a, b, e, ranknum = tensors
    # PEFT trains ranknum where it has cast the adapter: its gradient goes through these R numbers.
    scaling = layer.scaling[adapter] / (ranknum.float() + 1e-5)
    return LoraBranch(a, b, 1.0, None, p, rank_scale=e.float().flatten() * scaling)


def _delora(layer: Any, adapter: str, tensors: Sequence[Tensor], p: float) -> LoraBranch:
    a, b, strength, w_norm = tensors
    norms = [f.float().norm(dim=d).clamp(min=1e-4) for f, d in ((a, 1), (b, 0))]
    scale = strength.float() / layer.r[adapter] / (norms[0] * norms[1])
    return LoraBranch(a.float() * w_norm.float(), b, 1.0, None, p, rank_scale=scale)


_METHODS = {
    ("peft.tuners.vera.layer", "Linear"): _Method(
        "VeRA",
        ("vera_A", "vera_B", "vera_lambda_d", "vera_lambda_b"),
        "vera_dropout",
        _vera,
        casts=True,
        returns_input_dtype=True,
    ),
    ("peft.tuners.adalora.layer", "SVDLinear"): _Method(
        "AdaLoRA",
        ("lora_A", "lora_B", "lora_E", "ranknum"),
        "lora_dropout",
        _adalora,
        casts=True,
        returns_input_dtype=False,
    ),
    ("peft.tuners.delora.layer", "DeloraLinear"): _Method(
        "DeLoRA",
        ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
        "delora_dropout",
        _delora,
        casts=False,
        returns_input_dtype=True,
    ),
}


def lowrank_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer of these methods, of any type, in the model."""
    for name, module in model.named_modules():
        if is_lowrank(module):
            yield name, module


def is_lowrank(module: nn.Module) -> bool:
    """True for PEFT's layers of these methods, of any type."""
    if not peft.loaded():
        return False
    from peft.tuners.adalora.layer import AdaLoraLayer
    from peft.tuners.delora.layer import DeloraLayer
    from peft.tuners.vera.layer import VeraLayer

    return isinstance(module, (AdaLoraLayer, DeloraLayer, VeraLayer))


def is_linear_like(layer_class: type[nn.Module]) -> bool:
    """True for exactly the layers whose output is that of their base plus the branches; AdaLoRA's
    around quantised bases and convolutions have forwards of their own.
    """
    return (layer_class.__module__, layer_class.__qualname__) in _METHODS


def _method(layer: nn.Module) -> _Method:
    return _METHODS[type(layer).__module__, type(layer).__qualname__]  # a swap keeps the names


def title(layer: nn.Module) -> str:
    """The method as it is written: "VeRA"."""
    titles = {key[0].split(".")[2]: method.title for key, method in _METHODS.items()}
    return titles[peft.method_of(layer)]


def returns_input_dtype(layer: nn.Module) -> bool:
    """True where the layer ends in a cast to the dtype of x, under autocast too."""
    return _method(layer).returns_input_dtype


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
        if _torch.hooked(dropout):
            return Reason(f"a hook on the dropout of {adapter!r}")
        if not 0 < a.shape[0] <= peft.LARGEST_RANK or a.shape[0] != b.shape[1]:
            return Reason(f"rank {a.shape[0]} / {b.shape[1]} is not in 1 ... {peft.LARGEST_RANK}")
        dtypes.update(tensor.dtype for tensor in tensors)
    if not dtypes:
        return Reason(peft.NO_ADAPTER, expected=True)
    if len(dtypes) > 1:
        return Reason("active adapters differ in dtype")
    if _torch.autocast_dtype(x.device.type) is not None:
        return None
    (dtype,) = dtypes
    if dtype != x.dtype and not getattr(layer, "cast_input_dtype_enabled", True):
        return Reason("input casting is disabled and the adapter has another dtype")
    if not _method(layer).casts and torch.promote_types(x.dtype, dtype) != dtype:
        return Reason(f"PEFT does not cast an input of {x.dtype} to the adapter's {dtype}")
    return None


def _active(layer: Any) -> list[str]:
    known = getattr(layer, _method(layer).tensors[2])
    return [adapter for adapter in layer.active_adapters if adapter in known]


def _tensors(layer: Any, adapter: str) -> list[Tensor]:
    """A, B and what scales them, as PEFT stores them."""
    return [getattr(layer, name)[adapter] for name in _method(layer).tensors]


def dropouts(layer: Any) -> nn.ModuleDict:
    """The dropout of every adapter."""
    modules: nn.ModuleDict = getattr(layer, _method(layer).dropout)
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
    p = peft_linear.dropout_p(dropouts(layer)[adapter])
    return _method(layer).branch(layer, adapter, _tensors(layer, adapter), p)

"""What a LoRA Linear computed at its last fused call, and whether it still does.

Reading a layer (its adapters, their weights, hooks, dropout, dtypes, shapes) takes longer than a
small layer takes on a GPU, and nearly always finds what it found before. So everything that was
read is kept with where it was read from, and the next call compares.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from fasttune import _torch
from fasttune.integrations import peft
from fasttune.ops import LoraProjection

_ABSENT = object()
_ATTRIBUTES = ("_modules", "scaling", "cast_input_dtype_enabled", "in_features", "out_features")
_FLAGS = ("merged_adapters", "lora_variant", "_disable_adapters", "_active_adapter")
_HOLDERS = ("lora_A", "lora_B", "lora_dropout")
# In a module's own attributes they hide its class's forward, or a parameter.
_SHADOWS = ("forward", "_hf_hook", "weight", "bias")


class Known:
    """The projection of a LoRA Linear, valid while :meth:`holds`. Refers to the layer weakly: it is
    kept by the layer.

    Attributes:
        projection: as ``peft_linear.projection`` made it, with tensors that were checked.
    """

    __slots__ = (
        "_active", "_adapter_dtypes", "_class", "_device", "_dtype", "_features", "_layer",
        "_modules", "_objects", "_own", "_places", "_tensors", "projection",
    )  # fmt: skip

    def __init__(self, layer: Any, projection: LoraProjection, weight: Tensor) -> None:
        self.projection = projection
        self._layer, self._class = weakref.ref(layer), type(layer)
        self._active = list(layer.active_adapters)
        self._features = layer.in_features
        self._dtype, self._device = weight.dtype, weight.device
        self._adapter_dtypes = {branch.a.dtype for branch in projection.branches}
        self._own = [(name, layer.__dict__.get(name, _ABSENT)) for name in _ATTRIBUTES]
        base = layer._modules["base_layer"]
        places: list[tuple[dict[str, Any], str, Any]] = [(layer._modules, "base_layer", base)]
        modules, holders = [base], []
        for name in _HOLDERS:
            holder = layer._modules[name]
            holders.append(holder)
            places.append((layer._modules, name, holder))
            places.append((holder.__dict__, "_modules", holder._modules))
            for adapter in self._active:
                module = holder._modules.get(adapter, _ABSENT)
                places.append((holder._modules, adapter, module))
                if module is not _ABSENT:
                    modules.append(module)
        for adapter in self._active:
            places.append((layer.scaling, adapter, layer.scaling.get(adapter, _ABSENT)))
        tensors = []
        for module in modules:
            parameters = module._parameters
            places.append((module.__dict__, "_parameters", parameters))
            for name in ("weight", "bias"):
                tensor = parameters.get(name, _ABSENT)
                places.append((parameters, name, tensor))
                if isinstance(tensor, Tensor):
                    facts = type(tensor), tensor.dtype, tensor.device, tensor.shape
                    tensors.append((tensor, *facts))
            if type(module) is nn.Dropout:
                own = module.__dict__
                places += [(own, key, own[key]) for key in ("p", "training")]
        self._places, self._tensors = places, tensors
        self._objects = [(it, type(it), it.__dict__) for it in (*modules, *holders)]
        self._modules = [module.__dict__ for module in modules]

    def holds(self, layer: Any, x: Tensor) -> bool:
        """Whether the layer still computes this projection, and x fits it; reads no attribute of a
        module through ``nn.Module.__getattr__``.
        """
        # A replica or a shallow copy has our record too.
        if self._layer() is not layer or type(layer) is not self._class:
            return False
        own = layer.__dict__
        if own["merged_adapters"] or own["lora_variant"] or own["_disable_adapters"]:
            return False
        active = own["_active_adapter"]
        if ([active] if isinstance(active, str) else active) != self._active:
            return False
        for key, value in self._own:
            if own.get(key, _ABSENT) is not value:
                return False
        for place, key, value in self._places:
            if place.get(key, _ABSENT) is not value:
                return False
        for it, cls, attributes in self._objects:
            if type(it) is not cls or it.__dict__ is not attributes:
                return False
        for attributes in self._modules:
            for key in _SHADOWS:
                if key in attributes:
                    return False
            for key in _torch.HOOKS:
                if attributes[key]:
                    return False
        for tensor, kind, dtype, device, shape in self._tensors:
            if tensor.dtype is not dtype or type(tensor) is not kind:
                return False
            if tensor.shape != shape or tensor.device != device:
                return False
        return self._fits(x, own)

    def _fits(self, x: Tensor, own: dict[str, Any]) -> bool:
        if x.dim() == 0 or x.shape[-1] != self._features or x.device != self._device:
            return False
        if x.dtype not in peft.FLOATS:
            return False
        casts = own.get("cast_input_dtype_enabled", True)
        if x.dtype is self._dtype and (casts or self._adapter_dtypes == {x.dtype}):
            return True
        return _torch.autocast_dtype(x.device.type) is not None


def of(layer: Any, projection: LoraProjection) -> Known | None:
    """What was just read of a layer, or None where comparing would not be enough (an opaque base, a
    weight that is a view, a scaling tensor) or would keep alive what is not the layer's: tensors
    that ``torch.func.functional_call`` or a sharding put in place for a time.
    """
    weight, own = projection.weight, layer.__dict__
    if weight is None or weight is not layer._modules["base_layer"]._parameters.get("weight"):
        return None
    if any(name not in own for name in _FLAGS):
        return None
    tensors = [weight, projection.bias]
    for branch in projection.branches:
        if isinstance(branch.scaling, Tensor):
            return None
        tensors += [branch.a, branch.b, branch.bias]
    if any(type(tensor) is not nn.Parameter for tensor in tensors if tensor is not None):
        return None
    return Known(layer, projection, weight)

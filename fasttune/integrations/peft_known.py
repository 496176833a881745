"""What a LoRA Linear computed at its last fused call, and whether it still does.

Reading a layer (its adapters, their weights, hooks, dropout, dtypes, shapes) takes longer than a
small layer takes on a GPU, and nearly always finds what it found before. So everything that was
read is kept with where it was read from, and the next call compares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttune import _torch
from fasttune.integrations import peft
from fasttune.ops import LoraProjection

_ABSENT = object()
_ATTRIBUTES = ("_modules", "scaling", "cast_input_dtype_enabled", "in_features", "out_features")
_FLAGS = ("merged_adapters", "lora_variant", "_disable_adapters", "_active_adapter")
# Of a module: what makes a call of it more than its class's forward (peft.hooked).
_EXTRAS = ("forward", "_hf_hook", *peft.HOOKS)


class Known:
    """The projection of a LoRA Linear, valid while :meth:`holds`.

    Attributes:
        projection: as ``peft_linear.projection`` made it, with tensors that were checked.
    """

    __slots__ = (
        "_active", "_adapter_dtypes", "_device", "_dtype", "_features", "_layer", "_modules",
        "_places", "_tensors", "projection",
    )  # fmt: skip

    def __init__(self, layer: Any, projection: LoraProjection, weight: Tensor) -> None:
        self.projection = projection
        self._layer = layer.__dict__
        self._active = list(layer.active_adapters)
        self._features = layer.in_features
        self._dtype, self._device = weight.dtype, weight.device
        self._adapter_dtypes = {branch.a.dtype for branch in projection.branches}
        places: list[tuple[dict[str, Any], str, Any]] = []
        base = layer._modules["base_layer"]
        modules = [base]
        for attribute in _ATTRIBUTES:
            places.append((layer.__dict__, attribute, layer.__dict__.get(attribute, _ABSENT)))
        places.append((layer._modules, "base_layer", base))
        for holder in ("lora_A", "lora_B", "lora_dropout"):
            of_adapters = layer._modules[holder]
            places.append((layer._modules, holder, of_adapters))
            places.append((of_adapters.__dict__, "_modules", of_adapters._modules))
            for adapter in self._active:
                module = of_adapters._modules.get(adapter, _ABSENT)
                places.append((of_adapters._modules, adapter, module))
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
                    tensors.append(
                        (tensor, type(tensor), tensor.dtype, tensor.device, tensor.shape)
                    )
            if type(module) is nn.Dropout:
                places += [
                    (module.__dict__, key, module.__dict__[key]) for key in ("p", "training")
                ]
        self._places, self._tensors = places, tensors
        self._modules = [(module, type(module), module.__dict__) for module in modules]

    def holds(self, layer: Any, x: Tensor) -> bool:
        """Whether the layer still computes this projection, and x fits it; reads no attribute of a
        module through ``nn.Module.__getattr__``.
        """
        own = layer.__dict__
        if own is not self._layer:  # a replica or a shallow copy has our record too
            return False
        if own["merged_adapters"] or own["lora_variant"] or own["_disable_adapters"]:
            return False
        active = own["_active_adapter"]
        if ([active] if isinstance(active, str) else active) != self._active:
            return False
        for place, key, value in self._places:
            if place.get(key, _ABSENT) is not value:
                return False
        for module, cls, attributes in self._modules:
            if type(module) is not cls:
                return False
            for key in _EXTRAS:
                if attributes.get(key):
                    return False
        for tensor, kind, dtype, device, shape in self._tensors:
            if tensor.dtype is not dtype or type(tensor) is not kind:
                return False
            if tensor.shape != shape or tensor.device != device:
                return False
        return self._fits(x)

    def _fits(self, x: Tensor) -> bool:
        if x.dim() == 0 or x.shape[-1] != self._features or x.device != self._device:
            return False
        if x.dtype not in peft.FLOATS:
            return False
        casts = self._layer.get("cast_input_dtype_enabled", True)
        if x.dtype is self._dtype and (casts or self._adapter_dtypes == {x.dtype}):
            return True
        return _torch.autocast_dtype(x.device.type) is not None


def of(layer: Any, projection: LoraProjection) -> Known | None:
    """What was just read of a layer, or None where comparing would not be enough: an opaque base,
    a weight that is a view (of other memory once its parameter's ``data`` is set), a scaling
    tensor.
    """
    if projection.weight is not layer._modules["base_layer"]._parameters.get("weight"):
        return None
    if projection.weight is None or any(name not in layer.__dict__ for name in _FLAGS):
        return None
    if any(isinstance(branch.scaling, torch.Tensor) for branch in projection.branches):
        return None
    return Known(layer, projection, projection.weight)

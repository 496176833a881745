"""PEFT's LoRA on parameters (``target_parameters``) as fasttune sees it: ``ParamWrapper``, one
around each adapted parameter of a module, nested where a module has several.

Read from PEFT 0.21 (``peft/tuners/lora/layer.py``); tests/integrations/test_private_names.py fails
loudly when it moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from fasttune import _torch
from fasttune.integrations import peft
from fasttune.ops.lora_experts import LowRank
from fasttune.reason import Reason


def is_wrapper(layer: nn.Module) -> bool:
    """True for PEFT's wrapper of an adapted parameter."""
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(layer, ParamWrapper)


def outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost wrapper of every module whose parameters are adapted."""
    inner: set[nn.Module] = set()
    for name, layer in peft.lora_layers(model):
        if is_wrapper(layer):
            inner.add(_base(layer))
            if layer not in inner:
                yield name, layer


def chain(layer: nn.Module) -> list[Any]:
    """The wrappers around one module, the outermost one first."""
    wrappers = [layer]
    while is_wrapper(_base(wrappers[-1])):
        wrappers.append(_base(wrappers[-1]))
    return wrappers


def owner(layer: nn.Module) -> nn.Module:
    """The module whose parameters are adapted."""
    return _base(chain(layer)[-1])


def _base(layer: nn.Module) -> nn.Module:
    base = layer._modules["base_layer"]
    assert base is not None
    return base


def adapted(layer: nn.Module) -> list[str]:
    """The names of the adapted parameters of :func:`owner`."""
    return [wrapper.parameter_name for wrapper in chain(layer)]


def updates(layer: nn.Module) -> dict[str, list[LowRank]]:
    """The active adapters of each adapted parameter that has any, in the layout of the parameter
    and, as in PEFT, in its dtype.
    """
    found: dict[str, list[LowRank]] = {}
    for wrapper in chain(layer):
        for adapter in peft.active(wrapper):
            own = found.setdefault(wrapper.parameter_name, [])
            own.append(LowRank(*wrapper.get_delta_factors(adapter)).map(_dense))
    return found


def adapted_elements(layer: nn.Module) -> int:
    """Elements of all parameters of the experts that the wrappers of a layer adapt."""
    module = owner(layer)
    return sum(getattr(module, name).numel() for name in adapted(layer))


def _dense(factor: Tensor) -> Tensor:
    """PEFT keeps B with the expert as the fastest dimension, which no product takes."""
    return factor if 1 in factor.stride()[1:] else factor.contiguous()


def why_original(layer: nn.Module) -> Reason | None:
    """Why PEFT's own forward runs now, or None if the updated weights need not be formed."""
    wrappers, module = chain(layer), owner(layer)
    if any(wrapper.disable_adapters for wrapper in wrappers):
        return Reason("adapters are disabled", expected=True)
    if any(wrapper.merged for wrapper in wrappers):
        return Reason("adapters are merged", expected=True)
    if not any(peft.active(wrapper) for wrapper in wrappers):
        return Reason(peft.NO_ADAPTER, expected=True)
    if torch_module._has_any_global_hook():
        return Reason("a global module hook is registered")
    if any(_torch.hooked(inner) for inner in (*wrappers[1:], module)):
        return Reason("a hook on base_layer")
    if parametrize.is_parametrized(module):
        return Reason("the experts are parametrized: quantised or changed by another library")
    for wrapper in wrappers:
        reason = _why_parameter(wrapper, module._parameters.get(wrapper.parameter_name))
        if reason is not None:
            return reason
    return None


def _why_parameter(wrapper: Any, parameter: Tensor | None) -> Reason | None:
    if parameter is None or not peft.plain(parameter):
        return Reason(f"{wrapper.parameter_name} is sharded or offloaded")
    if parameter.dtype not in peft.FLOATS:
        return Reason(f"{wrapper.parameter_name} is {parameter.dtype}")
    if parameter.dim() != 3 or len(parameter) != wrapper.num_experts or wrapper.num_experts < 2:
        return Reason(f"{wrapper.parameter_name} of shape {tuple(parameter.shape)} is no stack")
    for adapter in peft.active(wrapper):
        reason = _why_adapter(wrapper, adapter, parameter.device)
        if reason is not None:
            return reason
    return None


def _why_adapter(wrapper: Any, adapter: str, device: torch.device) -> Reason | None:
    if adapter in wrapper.lora_variant:
        return Reason(f"LoRA variant {type(wrapper.lora_variant[adapter]).__name__}")
    for factor in (wrapper.lora_A[adapter], wrapper.lora_B[adapter]):
        if type(factor) is not nn.Linear:
            return Reason(f"lora_A is {type(factor).__name__}, not nn.Linear")
        weight = factor._parameters.get("weight")
        if weight is None or not peft.plain(weight):
            return Reason("adapter weights are sharded")
        if weight.dtype not in peft.FLOATS:
            return Reason(f"adapter is {weight.dtype}")
        if weight.device != device:
            return Reason(f"adapter on {weight.device}, {wrapper.parameter_name} on {device}")
    scaling = wrapper.scaling[adapter]
    if isinstance(scaling, Tensor) and (
        scaling.requires_grad or scaling.dim() or scaling.device != device
    ):
        return Reason("scaling is a trained or remote tensor")
    rank = wrapper.lora_A[adapter].weight.shape[0] // wrapper.num_experts
    return Reason(f"rank {rank} is above {peft.LARGEST_RANK}") if rank > peft.LARGEST_RANK else None

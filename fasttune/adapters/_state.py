"""The bottleneck adapters that a model has: their configurations, banks and parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from fasttune.adapters import _saved
from fasttune.adapters._bank import CHILD, AdapterBank
from fasttune.integrations import peft

STATE = "_fasttune_bottlenecks"  # on the model: configs by name, trained base parameters


def root(model: nn.Module) -> nn.Module:
    """The model that names and keeps the adapters: inside a PeftModel, its base model."""
    return peft.base_model(model)


def names(model: nn.Module) -> tuple[str, ...]:
    """The adapters that ``model`` has, in the order in which they were added."""
    return tuple(root(model).__dict__.get(STATE, {}).get("configs", {}))


def trained_besides(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained and that :func:`save` of no adapter writes."""
    base = root(model)
    saved = {id(p) for name in names(model) for p in parameters_of(base, name).values()}
    return [
        (key, p) for key, p in model.named_parameters() if p.requires_grad and id(p) not in saved
    ]


def layers_with_banks(model: nn.Module) -> list[tuple[nn.Module, AdapterBank]]:
    """Every layer that an adapter follows, with its bank."""
    layers = [(layer, layer._modules.get(CHILD)) for layer in model.modules()]
    return [(layer, bank) for layer, bank in layers if isinstance(bank, AdapterBank)]


def banks(model: nn.Module) -> dict[str, AdapterBank]:
    """By the name of the layer that they follow, the same with and without PEFT's wrappers."""
    return {
        key.removesuffix(f".{CHILD}").replace(".base_layer", ""): module
        for key, module in model.named_modules()
        if isinstance(module, AdapterBank)
    }


def parameters_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """What is saved of an adapter: its own parameters by site, and those that are trained too."""
    return _saved.parameters(model, name, config_of(model, name)["train_also"], banks(model))


def config_of(model: nn.Module, name: str) -> dict[str, Any]:
    """The options of an adapter. Raises ValueError if there is none of that name."""
    return _saved.config(model.__dict__.get(STATE, {}).get("configs", {}), name)


def check_free(model: nn.Module, name: str) -> None:
    """Raises TypeError or ValueError unless a new adapter may have that name."""
    _saved.check_free(model.__dict__.get(STATE, {}).get("configs", {}), name, AdapterBank)

"""What a file of an adapter or of interventions holds, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

HEAD = "trained:"  # before the names of parameters that are trained too


def heads(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """The qualified names of the modules that ``train_also`` means.

    Raises:
        ValueError: a name fits no module.
    """
    if isinstance(wanted, str):
        wanted = [wanted]
    names = [key for key, _ in model.named_modules() if key]
    found = set()
    for name in wanted:
        matches = {key for key in names if key == name or key.endswith(f".{name}")}
        if not matches:
            raise ValueError(f"train_also: expected names of modules, got {name!r}")
        found |= matches
    return sorted(found)


def config(configs: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The configuration of ``name``.

    Raises:
        ValueError: there is none.
    """
    if name not in configs:
        raise ValueError(f"name: expected one of {', '.join(configs) or 'none'}, got {name!r}")
    return configs[name]


def activate(
    model: nn.Module,
    configs: Mapping[str, dict[str, Any]],
    banks: Iterable[Any],
    names: Sequence[str],
) -> None:
    """Apply and train ``names`` in every bank, in that order, and the modules trained with them.

    Raises:
        ValueError: there is none of a name, or one is named twice.
    """
    chosen = [config(configs, name) for name in names]
    if len(set(names)) != len(names):
        raise ValueError(f"names: expected each once, got {', '.join(names)}")
    for bank in banks:
        bank.active = tuple(name for name in names if name in bank)
        for key, module in bank.items():
            module.requires_grad_(key in names)
    wanted = {head for own in chosen for head in own["train_also"]}
    for head in {head for own in configs.values() for head in own["train_also"]}:
        model.get_submodule(head).requires_grad_(head in wanted)


def check_free(configs: Mapping[str, Any], name: Any, bank: type[nn.Module]) -> None:
    """Raises TypeError or ValueError unless ``name`` is unused and may name a child of ``bank``."""
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")
    if not re.fullmatch(r"[\w-]+", name) or hasattr(bank(), name):
        raise ValueError(
            f"name: expected letters, digits, _ and -, no attribute of a module, got {name!r}"
        )
    if name in configs:
        raise ValueError(f"name: expected an unused one, got {name!r}")


def parameters(
    model: nn.Module, name: str, train_also: Sequence[str], banks: Mapping[str, Any]
) -> dict[str, nn.Parameter]:
    """The parameters of ``name`` in every bank, and those of the modules ``train_also``."""
    trained = {
        f"{HEAD}{module}.{key}": parameter
        for module in train_also
        for key, parameter in model.get_submodule(module).named_parameters()
    }
    return trained | {
        f"{site}.{key}": parameter
        for site, bank in banks.items()
        if name in bank
        for key, parameter in bank[name].named_parameters()
    }

"""Writes the bottleneck adapters of a model to files and reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.adapters import _hub
from fasttune.adapters._placing import add, remove
from fasttune.adapters._state import banks, config_of, parameters_of, root

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LAYOUTS = ("fasttune", "adapters")


def save(model: nn.Module, name: str, directory: str | Path, *, layout: str = "fasttune") -> None:
    """Write the adapter ``name``, for :func:`load` or for the library adapters.

    Args:
        model: the model.
        name: of the adapter.
        directory: made if it is not there.
        layout: "fasttune": ``adapter_model.safetensors`` and ``adapter_config.json``; "adapters":
            ``pytorch_adapter.bin`` and ``adapter_config.json`` as adapters 1.3 has them.

    Raises:
        ValueError: there is no such adapter or layout, or the library adapters does not know the
            type of the model or the placement.
    """
    from safetensors.torch import save_file

    model = root(model)
    config = config_of(model, name)
    if layout not in _LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(_LAYOUTS)}, got {layout!r}")
    path = Path(directory)
    tensors = {key: p.detach().contiguous() for key, p in parameters_of(model, name).items()}
    if layout == "adapters":
        _hub.write(path, name, model, config, tensors)
        return
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / _WEIGHTS, metadata={"format": "pt"})
    (path / _CONFIG).write_text(json.dumps({"name": name, **config}, indent=2) + "\n")


def load(
    model: nn.Module,
    directory: str | Path,
    name: str | None = None,
    *,
    example: Mapping[str, Any] | None = None,
) -> str:
    """Add what :func:`save` or the library adapters wrote, under its own name or ``name``, and
    activate it.

    ``example`` is that of :func:`add`.

    Returns:
        The adapter's name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights do not fit the model, :func:`add` refuses, or fasttune does not
            compute what a field of the library's configuration asks for. The model is left as it
            was.
    """
    from safetensors.torch import load_file

    model = root(model)
    path = Path(directory)
    config = json.loads((path / _CONFIG).read_text())
    if not isinstance(config.get("name"), str):
        raise ValueError(f"directory: expected a bottleneck adapter, got another file in {path}")
    saved_name = config.pop("name")
    if _hub.recognises(config):
        config = _hub.options(model, config)
        tensors = _hub.read(path, saved_name, model, config["placement"])
    else:
        tensors = load_file(path / _WEIGHTS)
    name = saved_name if name is None else name
    grads = {key: p.requires_grad for key, p in model.named_parameters()}
    active = {site: bank.active for site, bank in banks(model).items()}
    add(model, name, **config, example=example)
    try:
        _check_shapes(model, name, tensors, path)
        _copy(model, name, tensors)
    except ValueError:
        remove(model, name)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(grads[key])
        for site, bank in banks(model).items():
            bank.active = active[site]
        raise
    return name


def restore(model: nn.Module, directories: Mapping[str, str | Path]) -> None:
    """Read what :func:`save` wrote into adapters that the model has already, all or none.

    Args:
        model: the model.
        directories: the folder of each adapter, by the name that it has in the model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is no such adapter, or it has other options or shapes.
    """
    model = root(model)
    saved = {name: _read(model, name, Path(path)) for name, path in directories.items()}
    for name, tensors in saved.items():
        _copy(model, name, tensors)


def _read(model: nn.Module, name: str, path: Path) -> dict[str, Tensor]:
    """The saved tensors of an adapter that the model has with the same options and shapes."""
    from safetensors.torch import load_file

    saved = json.loads((path / _CONFIG).read_text())
    own = json.loads(json.dumps(config_of(model, name)))
    differs = sorted(key for key in own if own[key] != saved.get(key))
    if differs:
        expected = ", ".join(f"{key}={own[key]!r}" for key in differs)
        got = ", ".join(f"{key}={saved.get(key)!r}" for key in differs)
        raise ValueError(f"directory: expected an adapter with {expected}, got {got} in {path}")
    tensors = load_file(path / _WEIGHTS)
    _check_shapes(model, name, tensors, path)
    return tensors


def _check_shapes(model: nn.Module, name: str, tensors: dict[str, Tensor], path: Path) -> None:
    shapes = {key: tuple(p.shape) for key, p in parameters_of(model, name).items()}
    if shapes != {key: tuple(t.shape) for key, t in tensors.items()}:
        raise ValueError(f"directory: expected the adapter of such a model, got other in {path}")


def _copy(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, parameter in parameters_of(model, name).items():
            parameter.copy_(tensors[key])

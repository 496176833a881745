"""ReFT on a whole model: add, activate, save, load, remove.

Interventions follow the blocks of a model, found by structure, or any layers that are named, and
edit their outputs at chosen positions of the prompt (Wu et al., 2024). ``_prompt.py`` says which
tokens are the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasttune.adapters import _prompt, _saved, _sites, _trace
from fasttune.adapters._positions import parse
from fasttune.adapters._reft_bank import CHILD, Intervention, ReftBank, attach, detach
from fasttune.nn import LoReft

_STATE = "_fasttune_reft"  # on the model: configs by name, trained base parameters
_CONFIG, _WEIGHTS = "reft_config.json", "reft_model.safetensors"


def add_reft(
    model: nn.Module,
    name: str,
    *,
    layers: str | Sequence[int | str] = "all",
    rank: int = 4,
    positions: str | Sequence[int] = "f1+l1",
    variant: str = "loreft",
    share_weights: bool = False,
    activation: str = "identity",
    dropout: float = 0.0,
    train_also: Sequence[str] = (),
) -> None:
    """Add the interventions ``name`` to ``model``, activate them alone and freeze everything else.

    Args:
        model: a transformer whose blocks are in one ModuleList; changed in place. Call it itself,
            not a part of it: its arguments tell which tokens are the prompt.
        name: letters, digits, ``_`` and ``-``.
        layers: "all" blocks, numbers of blocks (from the end where negative), or names of modules
            whose output is [batch, tokens, features].
        rank: of the subspace, from 1 to the width of the hidden states.
        positions: of the prompt: its first and last real tokens, as "f7+l7", "f7" or "l7"; "all";
            or a list of numbers, from the end where negative. Where first and last ones are asked
            for, each are at most half of a prompt.
        variant, activation, dropout: of :class:`fasttune.nn.LoReft`.
        share_weights: one intervention for the first and the last tokens; else one for each.
        train_also: names or name endings of modules, a classifier for one, that stay trainable and
            are saved with the interventions; all names share them.

    Raises:
        TypeError: ``name`` is no string, ``model`` no module, or the positions have another type.
        ValueError: ``name`` is taken or unusable, an option is out of range, there is no such
            layer, or the structure is not recognised. The model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _check_free(model, name)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("model: expected an encoder or a decoder, got both in one")
    where = parse(positions)
    heads = _saved.heads(model, train_also)
    options = {"variant": variant, "activation": activation, "dropout": dropout}
    made: dict[str, Intervention] = {}
    for layer in _layers(model, layers):
        width, device = _width(model, model.get_submodule(layer))
        parts = {
            part: LoReft(width, rank, device=device, **options)  # type: ignore[arg-type]
            for part in where.parts(share_weights)
        }
        made[layer] = Intervention(where, parts)
    if _STATE not in model.__dict__:
        trained = [key for key, p in model.named_parameters() if p.requires_grad]
        model.__dict__[_STATE] = {"configs": {}, "trained": trained}
        for called in _called(model):
            _prompt.attach(called)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer, intervention in made.items():
        attach(model.get_submodule(layer))[name] = intervention.train(model.training)
    model.__dict__[_STATE]["configs"][name] = {
        "layers": list(made),
        "rank": rank,
        "positions": positions if isinstance(positions, str) else list(positions),
        **options,
        "share_weights": share_weights,
        "train_also": heads,
    }
    activate_reft(model, name)


def activate_reft(model: nn.Module, *names: str) -> None:
    """Apply and train the interventions ``names``, in that order; none: the base model.

    Raises:
        ValueError: there are no such interventions, or some are named twice.
    """
    configs = model.__dict__.get(_STATE, {}).get("configs", {})
    _saved.activate(model, configs, _banks(model).values(), names)


def remove_reft(model: nn.Module, name: str) -> None:
    """Remove the interventions ``name``; the last ones leave the model as it was before the first.

    Raises:
        ValueError: there are none of that name.
    """
    _config(model, name)
    for layer, bank in _banks(model).items():
        if name in bank:
            del bank[name]
            bank.active = tuple(key for key in bank.active if key != name)
        if not bank:
            detach(model.get_submodule(layer))
    state = model.__dict__[_STATE]
    del state["configs"][name]
    if not state["configs"]:
        trained = set(state["trained"])
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key in trained)
        for called in _called(model):
            _prompt.detach(called)
        del model.__dict__[_STATE]


def save_reft(model: nn.Module, name: str, directory: str | Path) -> None:
    """Write ``reft_model.safetensors`` and ``reft_config.json`` of the interventions ``name``.

    Raises:
        ValueError: there are none of that name.
    """
    from safetensors.torch import save_file

    config = {"name": name, **_config(model, name)}
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {key: p.detach().contiguous() for key, p in _parameters(model, name).items()}
    save_file(tensors, path / _WEIGHTS, metadata={"format": "pt"})
    (path / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_reft(model: nn.Module, directory: str | Path, name: str | None = None) -> str:
    """Add what :func:`save_reft` wrote, under its own name or ``name``, and activate it.

    Returns:
        The name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights do not fit the model, or :func:`add_reft` refuses. The model is left
            as it was.
    """
    from safetensors.torch import load_file

    path = Path(directory)
    config = json.loads((path / _CONFIG).read_text())
    tensors = load_file(path / _WEIGHTS)
    saved_name = config.pop("name")
    name = saved_name if name is None else name
    grads = {key: p.requires_grad for key, p in model.named_parameters()}
    active = {layer: bank.active for layer, bank in _banks(model).items()}
    add_reft(model, name, **config)
    own = _parameters(model, name)
    shapes = {key: tuple(p.shape) for key, p in own.items()}
    if shapes != {key: tuple(t.shape) for key, t in tensors.items()}:
        remove_reft(model, name)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(grads[key])
        for layer, bank in _banks(model).items():
            bank.active = active[layer]
        raise ValueError(f"directory: expected interventions of such a model, got other in {path}")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(tensors[key])
    return name


def _called(model: Any) -> list[nn.Module]:
    """The modules whose forward starts one of the model: in a PeftModel, ``generate`` calls the
    model inside, and a forward does not.
    """
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    return [model] if inside is model else [model, inside]


def _layers(model: nn.Module, wanted: str | Sequence[int | str]) -> list[str]:
    """The qualified names of the layers that are meant, in the order of the model."""
    known = {key: place for place, (key, _) in enumerate(model.named_modules())}
    if wanted == "all":
        return _blocks(model)
    if isinstance(wanted, str) or not wanted:
        raise ValueError(f'layers: expected "all", numbers or names in a list, got {wanted!r}')
    found = []
    for item in wanted:
        if isinstance(item, str):
            if not item or item not in known:
                raise ValueError(f"layers: expected names of modules, got {item!r}")
            found.append(item)
            continue
        blocks = _blocks(model)
        if not -len(blocks) <= item < len(blocks):
            raise ValueError(f"layers: expected numbers below {len(blocks)}, got {item}")
        found.append(blocks[item])
    if len(set(found)) != len(found):
        raise ValueError(f"layers: expected each layer once, got {list(wanted)}")
    return sorted(found, key=known.__getitem__)


def _blocks(model: nn.Module) -> list[str]:
    found = _sites.blocks(model)
    if len({name.rpartition(".")[0] for name in found}) != 1:
        raise ValueError(
            "model: expected one ModuleList of layers of one class, each with an attention and an "
            f"MLP of linear layers, got {'several' if found else 'none'} in {type(model).__name__}"
        )
    return found


def _width(model: Any, layer: nn.Module) -> tuple[int, torch.device]:
    """The features of the output of ``layer``, and where its parameters are."""
    device = next((p.device for p in layer.parameters()), torch.device("cpu"))
    width = _trace.width(layer)
    config = getattr(model, "config", None)
    if width is None and config is not None:
        width = getattr(config.get_text_config(), "hidden_size", None)
    if width is None:
        raise ValueError(f"model: expected a config with a hidden_size, got {type(model).__name__}")
    return width, device


def _banks(model: nn.Module) -> dict[str, ReftBank]:
    """By the name of the layer that they follow."""
    return {
        key.removesuffix(f".{CHILD}"): module
        for key, module in model.named_modules()
        if isinstance(module, ReftBank)
    }


def _parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """What is saved: the interventions' own parameters by layer, and those that are trained too."""
    return _saved.parameters(model, name, _config(model, name)["train_also"], _banks(model))


def _config(model: nn.Module, name: str) -> dict[str, Any]:
    return _saved.config(model.__dict__.get(_STATE, {}).get("configs", {}), name)


def _check_free(model: nn.Module, name: str) -> None:
    _saved.check_free(model.__dict__.get(_STATE, {}).get("configs", {}), name, ReftBank)

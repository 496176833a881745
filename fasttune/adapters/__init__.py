"""Bottleneck adapters on a whole model: add, activate, stack, save, load, remove.

Adapters follow the linear layers that end the MLP (``seq_bn``; Pfeiffer et al., 2020) and, with
``double_seq_bn``, the attention (Houlsby et al., 2019) of every block: before the dropout, the
residual and the norm that come after; ``par_bn`` runs beside the MLP (He et al., 2022), and
``adapter_plus`` follows the whole block (Steitz and Roth, 2024). ``conv_parallel`` and
``conv_sequential`` are for convolutional models (Chen et al., 2022). The blocks are found by what a
forward does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasttune.adapters import _frozen_norms, _hub, _saved, _sites, _trace
from fasttune.adapters._bank import (
    CHILD,
    AdapterBank,
    attach,
    detach,
    end_parallel,
    make_parallel,
)
from fasttune.adapters.reft import activate_reft, add_reft, load_reft, remove_reft, save_reft
from fasttune.integrations import peft
from fasttune.nn import BottleneckAdapter, ConvAdapter

if TYPE_CHECKING:
    from fasttune.integrations.adapter_trainer import AdapterCheckpoints, AdapterTrainer

_STATE = "_fasttune_bottlenecks"  # on the model: configs by name, trained base parameters
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LAYOUTS = ("fasttune", "adapters")

__all__ = [
    "AdapterCheckpoints",
    "AdapterTrainer",
    "activate",
    "activate_reft",
    "add",
    "add_reft",
    "deactivate",
    "load",
    "load_reft",
    "names",
    "print_trainable_parameters",
    "remove",
    "remove_reft",
    "restore",
    "save",
    "save_reft",
    "stack",
    "trained_besides",
]


def add(
    model: nn.Module,
    name: str,
    placement: str = "seq_bn",
    *,
    reduction_factor: float = 16,
    activation: str | None = None,
    scaling: float | str | None = None,
    dropout: float = 0.0,
    train_also: Sequence[str] = (),
    example: Mapping[str, Any] | None = None,
) -> None:
    """Add the adapter ``name`` to ``model``, activate it alone and freeze everything else.

    A fresh adapter is the identity, but for "adapter_plus", where it is almost. A head is frozen
    too unless it is in ``train_also``. Where PEFT has injected layers, what it trains stays
    trained, and adapters follow those layers.

    Args:
        model: a transformer whose blocks are in a ModuleList; changed in place.
        name: letters, digits, ``_`` and ``-``.
        placement: "seq_bn", "double_seq_bn", "par_bn", which takes the input of the MLP, or
            "adapter_plus": after the block, with weights from N(0, 0.01) cut at two deviations;
            "hub_seq_bn", "hub_par_bn" and "hub_double_seq_bn": where the library adapters places
            its "seq_bn", "par_bn" and "double_seq_bn" (docs/adapters.md). "conv_parallel" and
            "conv_sequential", of a convolutional model, run beside and after a convolution of every
            residual block; batch norms then keep their statistics, also in training mode.
        reduction_factor: the output width of the layer over the bottleneck size, above 0; of a
            convolution, the channels that the adapter takes, and it must divide them.
        activation, scaling, dropout: of :class:`fasttune.nn.BottleneckAdapter` or
            :class:`fasttune.nn.ConvAdapter`; None: "relu" and 1.0, "gelu" and "channels" for
            "adapter_plus", and "relu" and "channels" for convolutions.
        train_also: names or name endings of modules, a classifier for one, that stay trainable and
            are saved with the adapter, as PEFT's ``modules_to_save``; all adapters share them.
        example: the arguments of a forward that reaches every block. Shapes and dtypes count, the
            forward has no weights (fasttune/adapters/_trace.py). Models of transformers need none.

    Raises:
        TypeError: ``name`` is no string, or ``model`` no module.
        ValueError: ``name`` is taken or unusable, the placement unknown, an option out of range, or
            the structure not recognised. The model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    model = _root(model)
    _check_free(model, name)
    if not reduction_factor > 0:
        raise ValueError(f"reduction_factor: expected a number above 0, got {reduction_factor}")
    heads = _saved.heads(model, train_also)
    sites = _sites.find(model, placement, example)
    plus, convolution = placement == "adapter_plus", placement in _sites.CONVOLUTIONS
    defaults = ("gelu" if plus else "relu", "channels" if plus or convolution else 1.0)
    options = {
        "activation": defaults[0] if activation is None else activation,
        "scaling": defaults[1] if scaling is None else scaling,
        "dropout": dropout,
    }
    made = {key: _adapter(model, site, reduction_factor, options) for key, site in sites.items()}
    for adapter in made.values() if plus else ():
        for key, parameter in (*adapter.down.named_parameters(), *adapter.up.named_parameters()):
            if key == "weight":
                nn.init.trunc_normal_(parameter, std=0.01, a=-0.02, b=0.02)
            else:
                nn.init.zeros_(parameter)
    state = model.__dict__.setdefault(_STATE, {"configs": {}})
    if "trained" not in state:
        state["trained"] = [key for key, p in model.named_parameters() if p.requires_grad]
        state["tuned"] = peft.has_layers(model)
    if not peft.has_layers(model):  # PEFT froze the rest when it injected its own
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    for layer, adapter in made.items():
        bank = attach(model.get_submodule(layer))
        bank[name] = adapter.train(model.training)
        source, bank.before = sites[layer].source, sites[layer].before
        if source is not None:
            make_parallel(bank, name, model.get_submodule(source))
    if convolution:
        _frozen_norms.freeze(model, heads)
    state["configs"][name] = {
        "placement": placement,
        "reduction_factor": reduction_factor,
        **options,
        "train_also": heads,
    }
    activate(model, name)


def activate(model: nn.Module, name: str) -> None:
    """Apply and train the adapter ``name`` alone. Raises ValueError if there is none."""
    stack(model, name)


def stack(model: nn.Module, *names: str) -> None:
    """Apply and train the adapters ``names``, each on the output of the one before it.

    Raises:
        ValueError: there is no such adapter, or one is named twice.
    """
    model = _root(model)
    for name in names:
        _config(model, name)
    if len(set(names)) != len(names):
        raise ValueError(f"names: expected each adapter once, got {', '.join(names)}")
    for bank in _banks(model).values():
        bank.active = tuple(name for name in names if name in bank)
        for key, adapter in bank.items():
            adapter.requires_grad_(key in names)
    configs = model.__dict__.get(_STATE, {}).get("configs", {})
    for module in {head for config in configs.values() for head in config["train_also"]}:
        wanted = any(module in configs[name]["train_also"] for name in names)
        model.get_submodule(module).requires_grad_(wanted)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters are trained, in the words of PEFT."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    share = 100 * trained / max(total, 1)
    print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}")


def deactivate(model: nn.Module) -> None:
    """Apply no adapter: the base model."""
    stack(model)


def remove(model: nn.Module, name: str) -> None:
    """Remove the adapter ``name``; the last one leaves the model as it was before the first.

    If PEFT has injected layers since, what it trains stays trained and nothing else is.

    Raises:
        ValueError: there is no such adapter.
    """
    model = _root(model)
    _config(model, name)
    for layer, bank in _layers_with_banks(model):
        if name in bank:
            del bank[name]
            end_parallel(bank, name, model)
            bank.active = tuple(key for key in bank.active if key != name)
        if not bank:
            detach(layer)
    state = model.__dict__[_STATE]
    config = state["configs"].pop(name)
    if not any(own["placement"] in _sites.CONVOLUTIONS for own in state["configs"].values()):
        _frozen_norms.unfreeze(model)
    if not state["configs"]:
        if peft.has_layers(model) and not state["tuned"]:  # PEFT has decided since
            for head in config["train_also"]:
                model.get_submodule(head).requires_grad_(False)
        else:
            trained = set(state["trained"])
            for key, parameter in model.named_parameters():
                parameter.requires_grad_(key in trained)
        del model.__dict__[_STATE]


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

    model = _root(model)
    config = _config(model, name)
    if layout not in _LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(_LAYOUTS)}, got {layout!r}")
    path = Path(directory)
    tensors = {key: p.detach().contiguous() for key, p in _parameters(model, name).items()}
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

    model = _root(model)
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
    active = {site: bank.active for site, bank in _banks(model).items()}
    add(model, name, **config, example=example)
    try:
        _check_shapes(model, name, tensors, path)
        _copy(model, name, tensors)
    except ValueError:
        remove(model, name)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(grads[key])
        for site, bank in _banks(model).items():
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
    model = _root(model)
    saved = {name: _read(model, name, Path(path)) for name, path in directories.items()}
    for name, tensors in saved.items():
        _copy(model, name, tensors)


def _read(model: nn.Module, name: str, path: Path) -> dict[str, Tensor]:
    """The saved tensors of an adapter that the model has with the same options and shapes."""
    from safetensors.torch import load_file

    saved = json.loads((path / _CONFIG).read_text())
    own = json.loads(json.dumps(_config(model, name)))
    differs = sorted(key for key in own if own[key] != saved.get(key))
    if differs:
        expected = ", ".join(f"{key}={own[key]!r}" for key in differs)
        got = ", ".join(f"{key}={saved.get(key)!r}" for key in differs)
        raise ValueError(f"directory: expected an adapter with {expected}, got {got} in {path}")
    tensors = load_file(path / _WEIGHTS)
    _check_shapes(model, name, tensors, path)
    return tensors


def names(model: nn.Module) -> tuple[str, ...]:
    """The adapters that ``model`` has, in the order in which they were added."""
    return tuple(_root(model).__dict__.get(_STATE, {}).get("configs", {}))


def trained_besides(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained and that :func:`save` of no adapter writes."""
    root = _root(model)
    saved = {id(p) for name in names(model) for p in _parameters(root, name).values()}
    return [
        (key, p) for key, p in model.named_parameters() if p.requires_grad and id(p) not in saved
    ]


def __getattr__(name: str) -> Any:
    if name in ("AdapterCheckpoints", "AdapterTrainer"):  # importing them imports transformers
        from fasttune.integrations import adapter_trainer

        return getattr(adapter_trainer, name)
    raise AttributeError(f"module 'fasttune.adapters' has no attribute {name!r}")


def _check_shapes(model: nn.Module, name: str, tensors: dict[str, Tensor], path: Path) -> None:
    shapes = {key: tuple(p.shape) for key, p in _parameters(model, name).items()}
    if shapes != {key: tuple(t.shape) for key, t in tensors.items()}:
        raise ValueError(f"directory: expected the adapter of such a model, got other in {path}")


def _copy(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, parameter in _parameters(model, name).items():
            parameter.copy_(tensors[key])


def _adapter(
    model: nn.Module, site: _sites.Site, reduction_factor: float, options: dict[str, Any]
) -> BottleneckAdapter | ConvAdapter:
    layer = _trace.base(model.get_submodule(site.linear))
    dtype = layer.weight.dtype if layer.weight.is_floating_point() else torch.float32
    options = {"device": layer.weight.device, "dtype": dtype, **options}
    if not isinstance(layer, nn.Conv2d):
        size = max(1, int(site.width / reduction_factor))
        return BottleneckAdapter(site.width, size, **options)
    options["kernel_size"], channels = layer.kernel_size, layer.out_channels
    if site.source is not None:
        channels = layer.in_channels
        for key in ("stride", "padding", "dilation"):
            options[key] = getattr(layer, key)
    size = max(1, int(channels / reduction_factor))
    if channels % size:
        raise ValueError(
            f"reduction_factor: expected one that divides the {channels} channels of "
            f"{site.linear}, got {reduction_factor}"
        )
    return ConvAdapter(channels, layer.out_channels, size, **options)


def _root(model: nn.Module) -> nn.Module:
    """The model that names and keeps the adapters: inside a PeftModel, its base model."""
    return peft.base_model(model)


def _layers_with_banks(model: nn.Module) -> list[tuple[nn.Module, AdapterBank]]:
    layers = [(layer, layer._modules.get(CHILD)) for layer in model.modules()]
    return [(layer, bank) for layer, bank in layers if isinstance(bank, AdapterBank)]


def _banks(model: nn.Module) -> dict[str, AdapterBank]:
    """By the name of the layer that they follow, the same with and without PEFT's wrappers."""
    return {
        key.removesuffix(f".{CHILD}").replace(".base_layer", ""): module
        for key, module in model.named_modules()
        if isinstance(module, AdapterBank)
    }


def _parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """What is saved of an adapter: its own parameters by site, and those that are trained too."""
    return _saved.parameters(model, name, _config(model, name)["train_also"], _banks(model))


def _config(model: nn.Module, name: str) -> dict[str, Any]:
    return _saved.config(model.__dict__.get(_STATE, {}).get("configs", {}), name)


def _check_free(model: nn.Module, name: str) -> None:
    _saved.check_free(model.__dict__.get(_STATE, {}).get("configs", {}), name, AdapterBank)

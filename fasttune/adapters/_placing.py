"""Adds bottleneck adapters to a model, chooses which ones act, removes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fasttune.adapters import _frozen_norms, _saved, _sites, _trace
from fasttune.adapters._bank import attach, detach, end_parallel, make_parallel
from fasttune.adapters._state import (
    STATE,
    banks,
    check_free,
    config_of,
    layers_with_banks,
    root,
)
from fasttune.integrations import peft
from fasttune.nn import BottleneckAdapter, ConvAdapter


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
    model = root(model)
    check_free(model, name)
    number = isinstance(reduction_factor, int | float) and not isinstance(reduction_factor, bool)
    if not number or not reduction_factor > 0:
        raise ValueError(f"reduction_factor: expected a number above 0, got {reduction_factor!r}")
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
    state = model.__dict__.setdefault(STATE, {"configs": {}})
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
    model = root(model)
    configs = model.__dict__.get(STATE, {}).get("configs", {})
    _saved.activate(model, configs, banks(model).values(), names)


def deactivate(model: nn.Module) -> None:
    """Apply no adapter: the base model."""
    stack(model)


def remove(model: nn.Module, name: str) -> None:
    """Remove the adapter ``name``; the last one leaves the model as it was before the first.

    If PEFT has injected layers since, what it trains stays trained and nothing else is.

    Raises:
        ValueError: there is no such adapter.
    """
    model = root(model)
    config_of(model, name)
    for layer, bank in layers_with_banks(model):
        if name in bank:
            del bank[name]
            end_parallel(bank, name, model)
            bank.active = tuple(key for key in bank.active if key != name)
        if not bank:
            detach(layer)
    state = model.__dict__[STATE]
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
        del model.__dict__[STATE]


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters are trained, in the words of PEFT."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    share = 100 * trained / max(total, 1)
    print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}")


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

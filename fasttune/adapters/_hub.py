"""Checkpoints of the library adapters 1.3: its configuration, its names, and what they mean here.

A bottleneck f of that library turns the output h of a sub-block with the residual r into h + f(h)
("double_seq_bn"; ours of the same name), with ``original_ln_before`` into h + f(LN(h + r)), or
h + f(h + r) where the norm comes first ("seq_bn"; our "hub_seq_bn"), or h + f(r) ("par_bn"; our
"hub_par_bn"). In an encoder-decoder its "double_seq_bn" leaves out the attention to the encoder
(our "hub_double_seq_bn") unless ``cross_adapter`` is set (our "double_seq_bn"). Source:
methods/bottleneck.py, methods/modeling.py and loading.py of adapters 1.3.0;
tests/adapters/test_hub.py compares outputs with that library.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttune.adapters._saved import HEAD
from fasttune.adapters._sites import Site, find

CONFIG, WEIGHTS, SAFE_WEIGHTS = "adapter_config.json", "pytorch_adapter.bin", "adapter.safetensors"
_HEADS = ("pytorch_model_head.bin", "model_head.safetensors")
_VERSION = "adapters."
_WRITTEN = "adapters.1.3.0"


class _Stack(NamedTuple):
    """A stack of blocks by the names of that library, and where a block keeps its adapters."""

    path: str
    attention: str
    mlp: str
    cross: str = ""  # of a decoder's attention to the encoder


_BERT = ("attention.output", "output")
_OWN = ("attention_adapters", "output_adapters")
_T5 = (
    _Stack("encoder.block", "layer.0", "layer.1"),
    _Stack("decoder.block", "layer.0", "layer.2", "layer.1"),
)
_BART = (
    _Stack("model.encoder.layers", *_OWN),
    _Stack("model.decoder.layers", *_OWN, "cross_attention_adapters"),
)
_NAMES = {
    "bart": _BART,
    "bert": (_Stack("bert.encoder.layer", *_BERT),),
    "distilbert": (_Stack("distilbert.transformer.layer", *_OWN),),
    "electra": (_Stack("electra.encoder.layer", *_BERT),),
    "gpt2": (_Stack("transformer.h", *_OWN),),
    "llama": (_Stack("model.layers", *_OWN),),
    "mbart": _BART,
    "mistral": (_Stack("model.layers", *_OWN),),
    "mt5": _T5,
    "roberta": (_Stack("roberta.encoder.layer", *_BERT),),
    "t5": _T5,
    "vit": (_Stack("vit.encoder.layer", "attention_adapters", "output.output_adapters"),),
}

_PARAMETERS = {
    "adapter_down.0.weight": "down.weight",
    "adapter_down.0.bias": "down.bias",
    "adapter_up.weight": "up.weight",
    "adapter_up.bias": "up.bias",
    "scaling": "scale",
}

# What a field must be for every placement; then what tells the placements apart.
_ALWAYS: dict[str, Any] = {
    "architecture": None, "output_adapter": True, "ln_before": False, "ln_after": False,
    "use_gating": False, "phm_layer": False, "inv_adapter": None, "leave_out": [],
    "stochastic_depth": 0.0,
}  # fmt: skip
_SEQUENTIAL = {"is_parallel": False, "mh_adapter": False, "cross_adapter": False}
_PLACEMENTS: dict[str, dict[str, Any]] = {
    "double_seq_bn": {
        "is_parallel": False, "mh_adapter": True, "cross_adapter": False,
        "original_ln_before": False, "original_ln_after": True,
    },
    "hub_seq_bn": {
        **_SEQUENTIAL, "original_ln_before": True, "original_ln_after": True,
        "residual_before_ln": True,
    },
    "adapter_plus": {
        **_SEQUENTIAL, "original_ln_before": True, "original_ln_after": False,
        "residual_before_ln": False,
    },
    "seq_bn": {**_SEQUENTIAL, "original_ln_before": False, "original_ln_after": True},
    "hub_par_bn": {
        "is_parallel": True, "mh_adapter": False, "cross_adapter": False, "original_ln_after": True,
    },
}  # fmt: skip
_READ = {"reduction_factor", "non_linearity", "scaling", "dropout"}
# They set first values, or options of layers that are not there.
_WITHOUT_EFFECT = {
    "init_weights", "init_weights_seed", "inv_adapter_reduction_factor", "phm_dim", "phm_rank",
    "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init",
    "phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_bias",
    "adapter_residual_before_ln", "original_ln_before", "residual_before_ln",
}  # fmt: skip

_ACTIVATIONS = {
    "relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu2": "relu2", "tanh": "tanh",
    "sigmoid": "sigmoid", "leakyrelu": "leaky_relu", "leaky_relu": "leaky_relu",
    "linear": "identity",
}  # fmt: skip
_WRITTEN_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "identity": "linear"}
_SCALINGS = {"learned": "scalar", "channel": "channels"}

logger = logging.getLogger("fasttune")


def recognises(config: Mapping[str, Any]) -> bool:
    """True for the configuration file of that library."""
    return "config" in config and "model_type" in config


def options(model: nn.Module, file: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`fasttune.adapters.add` takes for the configuration ``file``.

    Raises:
        ValueError: a field asks for something that fasttune does not compute in the same way, or
            the adapter is that of another type of model.
    """
    if not str(file.get("version", "")).startswith(_VERSION):
        raise _wrong("version", f"{_VERSION} and a number", file.get("version"))
    model_type = _model_type(model)
    if file["model_type"] != model_type:
        raise _wrong("model_type", repr(model_type), file["model_type"])
    config = dict(file["config"] or {})
    for field, value in _ALWAYS.items():
        if config.get(field, value) != value:
            raise _wrong(field, repr(value), config[field])
    known = {*_ALWAYS, *_PLACEMENTS["hub_seq_bn"], *_READ, *_WITHOUT_EFFECT}
    for field in sorted(config.keys() - known):
        raise _wrong(field, "no such field", config[field])
    for field in sorted(_READ - config.keys()):
        raise _wrong(field, "a value", None)
    placements = _placements(model)
    wrong = {
        placement: [key for key in fields if config.get(key) != fields[key]]
        for placement, fields in placements.items()
    }
    placement = min(wrong, key=lambda key: len(wrong[key]))
    for field in wrong[placement]:
        raise _wrong(field, repr(placements[placement][field]), config.get(field))
    factor, width = config["reduction_factor"], file.get("hidden_size")
    if not isinstance(width, int):
        raise _wrong("hidden_size", "a number", width)
    if not isinstance(factor, (int, float)) or not _same_size(width, factor):
        raise _wrong("reduction_factor", f"one number that divides {width}", factor)
    activation = str(config["non_linearity"]).lower()
    if activation not in _ACTIVATIONS:
        raise _wrong("non_linearity", f"one of {', '.join(_ACTIVATIONS)}", activation)
    scaling = config["scaling"]
    if isinstance(scaling, str) and scaling not in _SCALINGS:
        raise _wrong("scaling", f"a number or one of {', '.join(_SCALINGS)}", scaling)
    return {
        "placement": placement,
        "reduction_factor": factor,
        "activation": _ACTIVATIONS[activation],
        "scaling": _SCALINGS.get(scaling, scaling),
        "dropout": config["dropout"],
    }


def read(path: Path, name: str, model: nn.Module, placement: str) -> dict[str, Tensor]:
    """The tensors of the adapter ``name`` in the folder ``path``, by their names in fasttune.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: they are not those of such a model.
    """
    if (path / SAFE_WEIGHTS).is_file():
        from safetensors.torch import load_file

        found = load_file(path / SAFE_WEIGHTS)
    else:
        found = torch.load(path / WEIGHTS, map_location="cpu", weights_only=True)
    for head in _HEADS:
        if (path / head).is_file():
            logger.warning("%s in %s is not read: an adapter has no head here", head, path)
    tensors, sites = {}, find(model, placement)
    for theirs, ours in _names(model, name, sites):
        stack = theirs.partition(".")[2]  # of a model without a head
        for key in (theirs, stack):
            if key in found:
                tensors[ours] = found.pop(key)
    if found:
        raise ValueError(
            f"directory: expected the adapter of a {_model_type(model)} with {len(sites)} "
            f"adapters, got {next(iter(found))} in {path}"
        )
    return tensors


def write(
    path: Path,
    name: str,
    model: nn.Module,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write the adapter ``name`` of ``config``, the options of :func:`fasttune.adapters.add`.

    Raises:
        ValueError: that library has no such adapter, or no such type of model.
    """
    placement = config["placement"]
    sites = find(model, placement)
    theirs = dict(_names(model, name, sites))
    if placement == "par_bn" and sites == find(model, "hub_par_bn"):  # the norm comes after
        placement = "hub_par_bn"
    placements = _placements(model)
    if placement == "hub_double_seq_bn" and placement not in placements:  # nothing to leave out
        placement = "double_seq_bn"
    if placement not in placements:
        raise ValueError(
            f"placement: expected one of {', '.join(placements)} for this model and the library "
            f"adapters, got {placement!r}"
        )
    width = next(iter(sites.values())).width
    factor = config["reduction_factor"]
    if not _same_size(width, factor):
        raise _wrong("reduction_factor", f"one that divides {width}", factor)
    activation, scaling = config["activation"], config["scaling"]
    scalings = {ours: name for name, ours in _SCALINGS.items()}
    model_config: Any = model.config
    file = {
        "config": {
            "original_ln_before": False,
            "residual_before_ln": True,
            **{key: value for key, value in _ALWAYS.items() if key != "architecture"},
            **placements[placement],
            "reduction_factor": factor,
            "non_linearity": _WRITTEN_ACTIVATIONS.get(activation, activation),
            "scaling": scalings[scaling] if scaling in scalings else float(scaling),
            "dropout": config["dropout"],
        },
        "hidden_size": width,
        "model_class": type(model).__name__,
        "model_name": getattr(model_config, "name_or_path", ""),
        "model_type": _model_type(model),
        "name": name,
        "version": _WRITTEN,
    }
    if config["train_also"]:
        logger.warning(
            "%s trained with the adapter %s: that library keeps no other modules in an adapter, "
            "they are not written",
            ", ".join(config["train_also"]),
            name,
        )
    state = {key: tensors[ours] for key, ours in theirs.items() if ours in tensors}
    left = tensors.keys() - theirs.values() - {key for key in tensors if key.startswith(HEAD)}
    if left:
        raise ValueError(f"model: expected adapters at {', '.join(sites)}, got {min(left)}")
    path.mkdir(parents=True, exist_ok=True)
    torch.save(state, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(file, indent=2, sort_keys=True) + "\n")


def _names(model: nn.Module, name: str, sites: Mapping[str, Site]) -> Iterable[tuple[str, str]]:
    """(name of that library, name in fasttune) of every parameter that an adapter may have."""
    model_type = _model_type(model)
    if model_type not in _NAMES:
        raise ValueError(
            f"model: expected one of the types {', '.join(_NAMES)} for an adapter of the library "
            f"adapters, got {model_type}"
        )
    blocks: dict[str, list[str]] = {}  # by their stack
    for block in dict.fromkeys(site.block for site in sites.values()):
        blocks.setdefault(block.rpartition(".")[0], []).append(block)
    for key, site in sites.items():
        own = site.block.rpartition(".")[0]
        stack = next(
            each for each in _NAMES[model_type]
            if len(_NAMES[model_type]) == 1 or own.endswith(each.path.removeprefix("model."))
        )  # fmt: skip
        attention = stack.cross if site.cross else stack.attention
        place = attention if site.attention else stack.mlp
        block = f"{stack.path}.{blocks[own].index(site.block)}"
        for theirs, ours in _PARAMETERS.items():
            yield f"{block}.{place}.adapters.{name}.{theirs}", f"{key}.{ours}"


def _placements(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The fields of every placement. With an encoder, "double_seq_bn" has an adapter at the
    attention to it too, which is not that library's default.
    """
    if not any(stack.cross for stack in _NAMES.get(_model_type(model), ())):
        return _PLACEMENTS
    double = _PLACEMENTS["double_seq_bn"]
    return {
        **_PLACEMENTS,
        "double_seq_bn": {**double, "cross_adapter": True},
        "hub_double_seq_bn": double,
    }


def _same_size(width: int, factor: float) -> bool:
    """True unless that library, which rounds a quotient of floats down, has another bottleneck."""
    return factor > 0 and int(width // factor) == int(width / factor)


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _wrong(field: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{CONFIG}: {field}: expected {expected}, got {got!r}")

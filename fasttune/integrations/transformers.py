"""transformers as fasttune sees it: causal language models, their head and loss, and the Trainer
callback.

Read from transformers 5.23 (``modeling_utils.py``, ``loss/loss_utils.py``).
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn


def loaded() -> bool:
    """True if transformers has been imported: else no model can be one of its."""
    return "transformers" in sys.modules


def models_with_head(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every transformers model inside ``model`` that has output embeddings."""
    if not loaded():
        return
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and isinstance(head_or_none(module), nn.Module):
            yield name, module


def head_or_none(model: Any) -> nn.Module | None:
    """The output head, PEFT's wrappers included, or None."""
    try:
        found = model.get_output_embeddings()
    except NotImplementedError:
        return None
    return cast("nn.Module | None", found)


def head(model: Any) -> nn.Module:
    """The output head of a model that has one."""
    return cast("nn.Module", model.get_output_embeddings())


def loss_function(model: Any) -> Any:
    """The function that the model calls as ``self.loss_function(logits, labels, vocab_size,
    ...)``.
    """
    return model.loss_function


def is_causal_loss(function: Any) -> bool:
    """True for exactly transformers' causal language-model loss."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return function is ForCausalLMLoss


def set_loss_function(model: Any, function: Any) -> None:
    """Install a loss function on this instance."""
    model.loss_function = function


def reset_loss_function(model: nn.Module, previous: Any) -> None:
    """Undo :func:`set_loss_function`; ``previous`` is the instance's own function before it, or
    None.
    """
    if previous is None:
        model.__dict__.pop("_loss_function", None)
    else:
        model.__dict__["_loss_function"] = previous


def own_loss_function(model: nn.Module) -> Any:
    """The loss function set on this instance, or None if it is the class's."""
    return model.__dict__.get("_loss_function")


def is_attention_interface(value: Any) -> bool:
    """True for the registry of attention functions that a forward looks its own up in."""
    if not loaded():
        return False
    from transformers.modeling_utils import AttentionInterface

    return isinstance(value, AttentionInterface)


class InterfaceWithSdpa:
    """An attention interface whose ``sdpa`` is ``ours(original, module, query, ...)``."""

    def __init__(self, interface: Any, ours: Any) -> None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        self._interface = interface
        self._stock = sdpa_attention_forward
        self._ours = functools.partial(ours, sdpa_attention_forward)

    def get_interface(self, *args: Any, **kwargs: Any) -> Any:
        chosen = self._interface.get_interface(*args, **kwargs)
        return self._ours if chosen is self._stock else chosen

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._interface, name)

    def __getitem__(self, name: str) -> Any:
        chosen = self._interface[name]
        return self._ours if chosen is self._stock else chosen


@dataclass(frozen=True)
class SdpaCall:
    """What ``sdpa_attention_forward`` hands to torch: the mask, causality and scale."""

    mask: Tensor | None
    causal: bool
    scale: float | None


def sdpa_call(
    module: Any, query: Tensor, key: Tensor, attention_mask: Any, kwargs: dict[str, Any]
) -> SdpaCall | None:
    """The call that ``sdpa_attention_forward`` (5.23) would make, or None if it is not plain."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    scale = given.pop("scaling", None)
    causal = given.pop("is_causal", getattr(module, "is_causal", True))
    if given.pop("dropout", 0.0) or given.pop("position_bias", None) is not None:
        return None
    if given.get("softcap") is not None or given.get("output_attentions"):
        return None
    length = query.shape[2]
    if length == 1 or (attention_mask is not None and not isinstance(attention_mask, Tensor)):
        return None
    if attention_mask is not None and attention_mask.requires_grad:  # computed by trained layers
        return None
    causal = bool(causal) and attention_mask is None
    if causal and key.shape[2] != length:
        return None
    return SdpaCall(attention_mask, causal, scale)


def with_hub_kernels(model: nn.Module) -> str | None:
    """The name of a (sub)model that runs kernels of the hub (``use_kernels=True``), or None."""
    for name, module in model.named_modules():
        if module.__dict__.get("_use_kernels"):
            return name or type(module).__name__
    return None


def instance_forward_owner(model: nn.Module) -> str | None:
    """The top-level package that installed a ``forward`` on this instance, or None."""
    forward = model.__dict__.get("forward")
    if forward is None:
        return None
    # functools.wraps copies __module__ from the wrapped forward; the globals tell who wrote the
    # code.
    function = getattr(forward, "__func__", forward)
    namespace = getattr(function, "__globals__", {})
    return str(namespace.get("__name__", "another library")).split(".")[0]


_STAND_IN_TOKENS = 512


def stand_in_batch(model: nn.Module) -> dict[str, Tensor] | None:
    """Two sequences of tokens with labels for a model with a language head; None for any other."""
    found = next((inner for _, inner in models_with_head(model)), None)
    if found is None:
        return None
    embedding = cast("Any", found).get_input_embeddings()
    config = cast("Any", found).config.get_text_config()
    # Half of them: some count positions from beyond the padding token.
    longest = (getattr(config, "max_position_embeddings", None) or 2 * _STAND_IN_TOKENS) // 2
    tokens = torch.arange(2 * min(_STAND_IN_TOKENS, longest), device=embedding.weight.device)
    ids = tokens.remainder(config.vocab_size).view(2, -1)
    return {"input_ids": ids, "labels": ids.clone()}


_TOKENS = 8


def example_inputs(model: nn.Module) -> list[dict[str, Tensor]]:
    """Batches of one without memory that the forward of a model of transformers may take, the
    fullest first; none for another module.
    """
    if not loaded():
        return []
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return []
    known = inspect.signature(model.forward).parameters
    inputs = {name: make for name, make in _INPUTS.items() if name in known}
    if not model.config.is_encoder_decoder:
        inputs.pop("decoder_input_ids", None)
    every = {name: make(model.config) for name, make in inputs.items()}
    every |= {k: v.to(model.dtype) for k, v in every.items() if v.is_floating_point()}
    main = {k: v for k, v in every.items() if k in (model.main_input_name, "decoder_input_ids")}
    return [every] if list(main) == list(every) else [every, main]


def _ids(config: Any) -> Tensor:
    return torch.empty((1, _TOKENS), dtype=torch.long, device="meta")


def _pixels(config: Any) -> Tensor:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    frames = (config.num_frames,) if hasattr(config, "num_frames") else ()  # of a video
    shape = (1, *frames, getattr(config, "num_channels", 3), height, width)
    return torch.empty(shape, device="meta")


def _spectrum(config: Any) -> Tensor:
    frames = 2 * getattr(config, "max_source_positions", 500)
    return torch.empty((1, getattr(config, "num_mel_bins", 80), frames), device="meta")


def _sound(config: Any) -> Tensor:
    if hasattr(config, "num_mel_bins"):  # a spectrogram by its time
        return torch.empty((1, config.max_length, config.num_mel_bins), device="meta")
    return torch.empty((1, 16000), device="meta")


_INPUTS: dict[str, Callable[[Any], Tensor]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "pixel_values": _pixels,
    "input_features": _spectrum,
    "input_values": _sound,
}


def eager(config: Any, copies: dict[int, Any]) -> Any:
    """A copy of a model's configuration that asks for plain torch; the same one for the same
    configuration and ``copies``, the memo of deepcopy.
    """
    copied = copy.deepcopy(config, copies)
    for name, value in (
        ("_attn_implementation", "eager"),
        ("_experts_implementation", "batched_mm"),
    ):
        if hasattr(copied, name):
            setattr(copied, name, value)
    return copied

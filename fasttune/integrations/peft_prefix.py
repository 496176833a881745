"""PEFT's prefix tuning, and transformers' checkpointed layers with a cache, as fasttune sees them.

Read from PEFT 0.21 (``peft/tuners/prefix_tuning/model.py``) and transformers 5.24
(``modeling_layers.py``, ``cache_utils.py``); tests/integrations/test_private_names.py fails loudly
when they move.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fasttune import _torch
from fasttune.integrations import peft
from fasttune.reason import Reason

CACHE_ARGUMENTS = ("cache", "past_key_values")  # the second is the older name
_KEEPS_CACHE = "_can_checkpoint_with_cache"


def encoders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every encoder of prefix tuning in the model."""
    if not peft.loaded():
        return
    from peft import PrefixEncoder

    for name, module in model.named_modules():
        if isinstance(module, PrefixEncoder):
            yield name, module


def prefixed_models(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Every model that a PeftModel gives the cached keys and values of a prefix, with what encodes
    it.
    """
    if not peft.loaded():
        return
    from peft import PeftModel

    for module in model.modules():
        if isinstance(module, PeftModel):
            own = [encoder for _, encoder in encoders(module)]
            if own:
                yield peft.base_model(module), own


def why_not_once(encoder: Any, modules: Sequence[type[nn.Module]]) -> Reason | None:
    """Why an encoder cannot be computed for one sample instead of all, or None.

    Args:
        encoder: of prefix tuning.
        modules: the classes of what its projection runs, before any swap.
    """
    parts = [encoder.embedding]
    if encoder.prefix_projection:
        parts += list(encoder.transform)
        if type(encoder.transform) is not nn.Sequential or set(modules) - {nn.Linear, nn.Tanh}:
            return Reason("the projection of the prefix is not that of PEFT")
    embedding = encoder.embedding
    if type(embedding) is not nn.Embedding or embedding.scale_grad_by_freq or embedding.sparse:
        return Reason("the embedding of the prefix is not that of PEFT")
    if any(_torch.hooked(part) for part in (*parts, *([encoder.transform] if parts[1:] else []))):
        return Reason("a hook on a part of the prefix encoder")
    return None


def projection_of(encoder: Any) -> list[nn.Module]:
    """What the encoder runs after its embedding."""
    return list(encoder.transform.modules())[1:] if encoder.prefix_projection else []


def virtual_tokens(encoder: Any) -> int:
    """The number of tokens that the encoder knows."""
    return int(encoder.embedding.num_embeddings)


# ---------------------------------------------------------------------------- checkpointing


def checkpointed_layers(model: nn.Module) -> list[Any]:
    """The layers of a transformers model that recompute their forward in backward."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]


def trains(cache: Any) -> bool:
    """True if keys or values of a cache have a gradient to come."""
    return any(
        isinstance(states, Tensor) and states.requires_grad
        for layer in getattr(cache, "layers", ())
        for states in (getattr(layer, "keys", None), getattr(layer, "values", None))
    )


def why_not_replayed(layers: Sequence[Any], cache: Any) -> Reason | None:
    """Why checkpointed layers cannot be given a cache that they only read, or None."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if not all(hasattr(layer, _KEEPS_CACHE) for layer in layers):
        return Reason("this version of transformers cannot checkpoint with a cache")
    for layer in layers:
        options = getattr(layer._gradient_checkpointing_func, "keywords", {})
        if options.get("use_reentrant") is not False:
            return Reason("reentrant checkpointing loses the gradient of a cached prefix")
    if type(cache) is not DynamicCache or cache.offloading:
        return Reason(f"the prefix is cached in {type(cache).__name__}")
    others = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
    return Reason(f"the prefix is cached in {', '.join(sorted(others))}") if others else None


def replayable(cache: Any) -> Any:
    """A cache with the same prefix that layers read and do not change, so that they may run
    twice.
    """
    read_only = copy.copy(cache)
    read_only.layers = [_prefix_layer()(layer) for layer in cache.layers]
    return read_only


@lru_cache(maxsize=1)
def _prefix_layer() -> type[Any]:
    from transformers.cache_utils import DynamicLayer

    class PrefixLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
        """The prefix of one layer: joined with new states at every call, never grown."""

        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.__dict__.update(layer.__dict__)
            self.reads = 0

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            self.reads += 1
            keys = torch.cat([self.keys, key_states], dim=-2)
            return keys, torch.cat([self.values, value_states], dim=-2)

    return PrefixLayer


def unread(cache: Any) -> list[int]:
    """The layers of a :func:`replayable` cache that nobody has read."""
    return [index for index, layer in enumerate(cache.layers) if not layer.reads]


@contextlib.contextmanager
def keeping_cache(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, checkpointed layers get the cache that they are called with, instead of None."""
    for layer in layers:
        layer.__dict__[_KEEPS_CACHE] = True
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop(_KEEPS_CACHE, None)

"""transformers as fasttune sees it: causal language models, their head and loss, and the Trainer
callback.

Read from transformers 5.23 (``modeling_utils.py``, ``loss/loss_utils.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, cast

from torch import nn


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

"""One training step on the user's batch, and the model's state around it: shared by verify,
compare and warmup."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasttune import _torch
from fasttune.errors import PatchError
from fasttune.patching import groups, state

LossFn = Callable[[nn.Module, Any], Tensor]


def run_loss(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Tensor:
    """The loss of a batch.

    Raises:
        TypeError: without loss_fn, the batch is no mapping.
        ValueError: the model returned no loss, or loss_fn no 0-d tensor.
    """
    if loss_fn is not None:
        loss: Any = loss_fn(model, batch)
    else:
        if not isinstance(batch, Mapping):
            raise TypeError(
                "batch: expected a mapping of the model's arguments (or pass loss_fn), "
                f"got {type(batch).__name__}"
            )
        loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"batch: expected a 0-d loss (does it have labels?), got {got}")
    if not loss.requires_grad:
        raise ValueError(
            "the loss needs no gradient: nothing is trained (frozen or merged adapters?)"
        )
    return loss


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restores random state, ``.grad``, buffers, train / eval mode and call records afterwards.

    Raises:
        PatchError: parameters are updated inside backward, so that a step would not leave them.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    for name, parameter in model.named_parameters():
        if _torch.acts_on_gradient(parameter):
            raise PatchError(
                f"model: {name} has a hook that runs on its gradient inside backward, as an "
                "optimizer that steps there has: remove it first (FusedBackward.remove())"
            )
    modes = [module.training for module in modules]
    grads = [parameter.grad for parameter in parameters]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    records = [
        (record, dict(vars(record)), record.fallbacks.copy(), set(record.unexpected))
        for module in modules
        for record in state.all_of(module).values()
    ]
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    fork = torch.random.fork_rng(devices=devices)
    with fork, torch.enable_grad(), groups.preserved(model):
        try:
            for parameter in parameters:
                parameter.grad = None
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for record, values, fallbacks, unexpected in records:
                vars(record).update(values)
                record.fallbacks, record.unexpected = fallbacks, unexpected

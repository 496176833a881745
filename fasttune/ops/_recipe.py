"""Recipes: what a consumer needs in backward is rebuilt from its producer's autograd node.

If the input of an op is the output of a :class:`Producer` (a norm, an activation), the op saves
nothing for it and calls :func:`rebuild` in its backward: the producer's node still holds what it
saved, and its backward runs after that of every consumer. The node is found through
``ctx.next_functions`` and nothing hangs on the tensor, so an in-place change of the tensor, which
gives it another ``grad_fn``, drops the recipe by itself, and a change of the producer's own input
raises as autograd does.

Saved tensors are unpacked once a node (checkpointing allows no more); the first reader keeps them,
and the rebuilt tensor, on the node until the producer's backward. Eager only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Producer:
    """Mixin of an ``autograd.Function`` with one output that consumers can rebuild.

    Its backward reads what it saved with ``saved(ctx, last=True)``, never ``ctx.saved_tensors``.
    ``ctx.rebuildable`` says in forward whether this call can be rebuilt (False under a dispatch
    mode or torch.compile).
    """

    @staticmethod
    def rebuild(node: Any, saved: tuple[Tensor, ...]) -> Tensor:
        """The output again, bit for bit, from ``saved``, on the backend that ran in forward."""
        raise NotImplementedError


def available(x: Tensor) -> bool:
    """True if ``x`` is the output of a producer as it left it."""
    node = x.grad_fn
    producer = getattr(type(node), "_forward_cls", None)
    if producer is None or not issubclass(producer, Producer):
        return False
    return bool(node.rebuildable)  # type: ignore[union-attr]


def rebuild(consumer: Any, position: int) -> Tensor:
    """In the backward of ``consumer``: its input number ``position`` among the tensor inputs."""
    node = consumer.next_functions[position][0]
    output: Tensor | None = getattr(node, "_fasttune_output", None)
    if output is None:
        with torch.no_grad():
            output = type(node)._forward_cls.rebuild(node, saved(node))
        node._fasttune_output = output
    return output


def saved(node: Any, *, last: bool = False) -> tuple[Tensor, ...]:
    """What the producer's node saved; ``last`` is the producer's own backward."""
    tensors: tuple[Tensor, ...] | None = getattr(node, "_fasttune_saved", None)
    if tensors is None:
        tensors = node.saved_tensors
    node._fasttune_saved = None if last else tensors
    if last:
        node._fasttune_output = None
    return tensors

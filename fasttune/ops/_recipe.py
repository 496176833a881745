"""Recipes: what a consumer needs in backward is rebuilt from its producer's autograd node.

If the input of an op is the output of a :class:`Producer` (a norm, an activation), the op saves
nothing for it and calls :func:`rebuild` in its backward: the producer's node still holds what it
saved, and its backward runs after that of every consumer. The node is found through
``ctx.next_functions`` and nothing hangs on the tensor, so an in-place change of the tensor, which
gives it another ``grad_fn``, drops the recipe by itself, and a change of the producer's own input
raises as autograd does.

Under a dispatch mode, the profiler or on meta the ops go through torch's dispatcher, and so does
the rebuilding. torch.compile sees no recipes.

Saved tensors are unpacked once a node (checkpointing allows no more); the first reader keeps them,
and the rebuilt tensor, on the node until the producer's backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fasttune import _torch
from fasttune._registry import Op


class Producer:
    """Mixin of an ``autograd.Function`` with one output that consumers can rebuild.

    Its backward reads what it saved with ``saved(ctx, last=True)``, never ``ctx.saved_tensors``.
    ``ctx.rebuildable`` says in forward whether this call can be rebuilt: :func:`possible`.
    """

    @staticmethod
    def rebuild(node: Any, saved: tuple[Tensor, ...]) -> Tensor:
        """The output again, bit for bit, from ``saved``, on the backend that ran in forward."""
        raise NotImplementedError


def possible(tensors: Iterable[Tensor | None]) -> bool:
    """True if a call of these inputs can be rebuilt: not traced, and no tensor subclass."""
    return not torch.compiler.is_compiling() and _torch.all_plain_or_meta(tensors)


def forward_again(node: Any, op: Op, *args: Any) -> Any:
    """The producer's forward again, on the backend or through the dispatcher, as it ran."""
    if node.backend is not None:
        return node.backend.run(*args)
    return op.registered(*args)


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
    tensors = saved(node)
    output: Tensor | None = getattr(node, "_fasttune_output", None)
    if output is None:
        with torch.no_grad():
            output = type(node)._forward_cls.rebuild(node, tensors)
        node._fasttune_output = output
    return output


def saved(node: Any, *, last: bool = False) -> tuple[Tensor, ...]:
    """What the producer's node saved; ``last`` is the producer's own backward.

    Raises RuntimeError, as autograd does, if a tensor kept by an earlier reader has been changed in
    place since.
    """
    if not node.rebuildable:  # nobody else reads it, and torch.compile traces no such attributes
        return node.saved_tensors  # type: ignore[no-any-return]
    kept: _Kept | None = getattr(node, "_fasttune_saved", None)
    if kept is None:
        tensors: tuple[Tensor, ...] = node.saved_tensors
        kept = tensors, [None if tensor is None else tensor._version for tensor in tensors]
    for tensor, version in zip(*kept, strict=True):
        if version is not None and tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: version {tensor._version}, expected {version}"
            )
    node._fasttune_saved = None if last else kept
    if last:
        node._fasttune_output = None
    return kept[0]


# Unpacked tensors (None where the producer saved None) and their versions at that time.
_Kept = tuple[tuple[Tensor, ...], list[int | None]]

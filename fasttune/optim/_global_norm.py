"""The sum of squares of all gradients, sharded ones included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from fasttune.ops.adamw import apply_sum_of_squares
from fasttune.optim._buckets import Plan


@dataclass
class _Part:
    """Gradients of one device and dtype that the same ranks hold; ``bucket`` is the index of the
    one bucket whose gradients they are, or None."""

    tensors: list[Tensor]
    bucket: int | None


def parts_of(
    plan: Plan, grads: Sequence[Tensor | None], flat_grads: Sequence[list[Tensor]]
) -> dict[Any, _Part]:
    """The gradients of the whole model, as :func:`sum_of_squares` takes them.

    Args:
        plan: its buckets.
        grads: those of the plan's parameters as autograd left them, some may be DTensors.
        flat_grads: for each bucket, what of its gradients lies on this rank, contiguous.

    Raises:
        ValueError: a DTensor holds partial sums.
    """
    parts: dict[Any, _Part] = {}
    for index, (bucket, own) in enumerate(zip(plan.buckets, flat_grads, strict=True)):
        kind = (bucket.format.device, bucket.format.grad)
        if bucket.plain:
            part = parts.setdefault((kind, None, ()), _Part([], index))
            part.bucket = index if not part.tensors else None
            part.tensors.extend(own)
            continue
        for position, mine in zip(bucket.positions, own, strict=True):
            part = parts.setdefault((kind, *_shards(grads[position])), _Part([], None))
            part.bucket = None
            part.tensors.append(mine)
    return parts


def sum_of_squares(
    parts: dict[Any, _Part], tables: Sequence[Tensor | None] = ()
) -> dict[Any, Tensor]:
    """By device: 0-d float64 over all gradients; ``tables`` are those of the steps of the buckets,
    where they are on the device already.
    """
    totals: dict[Any, Tensor] = {}
    for ((device, _), mesh, dims), part in parts.items():
        table = tables[part.bucket] if tables and part.bucket is not None else None
        squares = apply_sum_of_squares(part.tensors, table)
        for dim in dims:
            torch.distributed.all_reduce(squares, group=mesh.get_group(dim))
        totals[device] = squares if device not in totals else totals[device] + squares
    if len(totals) == 1:
        return totals
    everywhere = list(totals.values())
    return {
        device: torch.stack([t.to(device, non_blocking=True) for t in everywhere]).sum()
        for device in totals
    }


def _shards(grad: Tensor | None) -> tuple[Any, tuple[int, ...]]:
    """The mesh of a sharded gradient and its dimensions that hold different parts."""
    if not isinstance(grad, DTensor):
        return None, ()
    if any(placement.is_partial() for placement in grad.placements):
        raise ValueError(f"grad: expected sharded or replicated, got {grad.placements}")
    dims = tuple(i for i, placement in enumerate(grad.placements) if placement.is_shard())
    return (grad.device_mesh, dims) if dims else (None, ())

"""The sum of squares of all gradients, sharded ones included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from fasttune.ops.adamw import apply_sum_of_squares
from fasttune.optim._buckets import Plan


def sum_of_squares(
    plan: Plan, grads: Sequence[Tensor | None], flat_grads: Sequence[list[Tensor]]
) -> dict[Any, Tensor]:
    """By device: 0-d float64 over the gradients of the whole model.

    Args:
        plan: its buckets.
        grads: those of the plan's parameters as autograd left them, some may be DTensors.
        flat_grads: for each bucket, what of its gradients lies on this rank, contiguous.

    Raises:
        ValueError: a DTensor holds partial sums.
    """
    parts: dict[Any, list[Tensor]] = {}
    for bucket, own in zip(plan.buckets, flat_grads, strict=True):
        kind = (bucket.format.device, bucket.format.grad)
        if bucket.plain:
            parts.setdefault((kind, None, ()), []).extend(own)
            continue
        for position, mine in zip(bucket.positions, own, strict=True):
            parts.setdefault((kind, *_shards(grads[position])), []).append(mine)
    totals: dict[Any, Tensor] = {}
    for ((device, _), mesh, dims), tensors in parts.items():
        squares = apply_sum_of_squares(tensors)
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

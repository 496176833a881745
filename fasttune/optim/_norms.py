"""Norms of whole parameters where each rank holds a part, and limits on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from fasttune.ops import _adamw_storage as storage
from fasttune.optim._buckets import Bucket

_WEIGHT = 2  # column of the norms


def reduced(bucket: Bucket, norms: Tensor) -> Tensor:
    """The norms [n, 3] of whole tensors, from those of this rank's parts."""
    if not any(isinstance(param, DTensor) for param in bucket.params):
        return norms
    squares = norms.double().square()
    groups: dict[tuple[object, tuple[int, ...]], list[int]] = {}
    for row, param in enumerate(bucket.params):
        if isinstance(param, DTensor):
            dims = tuple(i for i, p in enumerate(param.placements) if p.is_shard())
            groups.setdefault((param.device_mesh, dims), []).append(row)
    for (mesh, dims), rows in groups.items():
        part = squares[rows]
        for dim in dims:
            torch.distributed.all_reduce(part, group=mesh.get_group(dim))  # type: ignore[attr-defined]
        squares[rows] = part
    return squares.sqrt().to(norms.dtype)


def limit_norms(bucket: Bucket, norms: Tensor, limits: Sequence[float | None]) -> None:
    """Scale the parameters of a bucket whose norm is above the limit of their group down to it.

    The factor stays on the device; a parameter within its limit keeps its bits.
    """
    if not any(limits):
        return
    limited = [i for i, group in enumerate(bucket.groups) if limits[group] is not None]
    wanted = norms.new_tensor([limits[bucket.groups[i]] for i in limited])
    weights = reduced(bucket, norms)[limited, _WEIGHT]
    factors = (wanted / weights).clamp(max=1.0).nan_to_num(nan=1.0)
    params = bucket.local(bucket.params)
    low_bits, rests = bucket.list_of("master_low_bits"), bucket.list_of("kahan_sum")
    for i, factor in zip(limited, factors.unbind(), strict=True):
        if low_bits:
            master = storage.load_master(params[i], low_bits[i]) * factor
            storage.store_master(master, params[i], low_bits[i])
            continue
        params[i].mul_(factor)
        if rests:
            rests[i].mul_(factor)

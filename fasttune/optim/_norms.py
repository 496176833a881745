"""Norms of whole parameters where each rank holds a part, and limits on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from fasttune.ops.adamw import apply_limit_norms
from fasttune.optim import _options as options
from fasttune.optim._buckets import Bucket


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
    """Scale the parameters of a bucket whose norm is above the limit of their group down to it."""
    if all(limits[group] is None for group in bucket.used_groups):
        return
    of_group = torch.tensor(
        [math.inf if limit is None else limit for limit in limits], dtype=torch.float64
    )
    rounding = bucket.format.rounding
    apply_limit_norms(
        bucket.local(bucket.params),
        bucket.list_of(options.residue_key(rounding)),
        reduced(bucket, norms),
        of_group[bucket.group_index],
        rounding,
    )

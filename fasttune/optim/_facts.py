"""The numbers of a step for each tensor: those that the host knows, and those on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttune.optim._buckets import Bucket
from fasttune_kernels.adamw_tables import FACTS

_STEP, _STREAM = FACTS.index("step"), FACTS.index("stream")


def of_groups(groups: Sequence[dict[str, Any]]) -> Tensor:
    """[groups, 7]: the facts that each group gives; 0 for what lies on another device."""
    rows = []
    for group in groups:
        numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        rows.append([*(_on_host(number) for number in numbers), 0.0, 0.0])
    return torch.tensor(rows, dtype=torch.float64)


def of_bucket(bucket: Bucket, table: Tensor) -> Tensor:
    """[n, 7]: the row of its group, its step and its stream for each tensor."""
    facts = table[bucket.group_index]
    steps = [step.item() if step.device.type == "cpu" else 0.0 for step in bucket.unique_steps]
    facts[:, _STEP] = torch.tensor(steps, dtype=torch.float64)[bucket.step_index]
    facts[:, _STREAM] = bucket.stream_column
    return facts


def on_device(
    bucket: Bucket, groups: Sequence[dict[str, Any]]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Learning rates, decays and steps that the host does not know, one for each tensor or none."""
    lists: list[list[Tensor]] = []
    for name in ("lr", "weight_decay"):
        values = {g: groups[g][name] for g in bucket.used_groups}
        if any(isinstance(v, Tensor) and v.device.type != "cpu" for v in values.values()):
            scalars = {g: _scalar(bucket.format.device, v) for g, v in values.items()}
            lists.append([scalars[g] for g in bucket.groups])
        else:
            lists.append([])
    remote = any(step.device.type != "cpu" for step in bucket.unique_steps)
    return lists[0], lists[1], bucket.state["step"] if remote else []


def _on_host(number: float | Tensor) -> float:
    if isinstance(number, Tensor) and number.device.type != "cpu":
        return 0.0
    return float(number)


def _scalar(device: torch.device, value: float | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=torch.float32, non_blocking=True).view(())
    return torch.full((), value, dtype=torch.float32, device=device)

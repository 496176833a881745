"""The tensors of a step, sorted into calls of the op: one for each device and set of formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fasttune.ops.adamw import flat
from fasttune.optim import _options as options

_DTYPE = attrgetter("dtype")  # a map over it is faster than a comprehension


@dataclass(frozen=True)
class Format:
    """What all tensors of one call share."""

    device: torch.device
    param: torch.dtype
    grad: torch.dtype
    moments: torch.dtype
    rounding: str
    amsgrad: bool
    maximize: bool


@dataclass
class Bucket:
    """One call of adamw_step; lists run parallel.

    Attributes:
        positions: of the parameters in their plan.
        streams: numbers of the parameters in the optimizer, which name their random bits.
        groups: index of each parameter's group.
        state: the tensors of the state by key, the step among them; parameters that step together
            share one.
    """

    format: Format
    positions: list[int]
    streams: list[int]
    groups: list[int]
    params: list[Tensor]
    state: dict[str, list[Tensor]]

    def __post_init__(self) -> None:
        self.group_index = torch.tensor(self.groups)
        self.stream_column = torch.tensor(self.streams, dtype=torch.float64)
        self.used_groups = sorted(set(self.groups))
        self.index_steps()
        everything = [*self.params, *(t for tensors in self.state.values() for t in tensors)]
        self.plain = all(local(tensor) is tensor for tensor in everything)

    def index_steps(self) -> None:
        """Which tensors the steps are, after they were replaced."""
        self.unique_steps = list({id(step): step for step in self.state["step"]}.values())
        place = {id(step): i for i, step in enumerate(self.unique_steps)}
        self.step_index = torch.tensor([place[id(step)] for step in self.state["step"]])

    def list_of(self, name: str | None) -> list[Tensor]:
        """The tensors of the state under a key; empty where the format has none."""
        return self.local(self.state.get(name, [])) if name is not None else []

    def local(self, tensors: list[Tensor]) -> list[Tensor]:
        """What of each lies on this rank, as it lies in memory; looked up at every step, because
        ``.data`` may be replaced.
        """
        return tensors if self.plain else [local(tensor) for tensor in tensors]

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients of a plan that belong here, in the memory order of their parameters."""
        own: list[Any] = [grads[i] for i in self.positions]
        if self.plain and all(map(Tensor.is_contiguous, own)):
            return own
        return [_like(grad, param) for grad, param in zip(own, self.params, strict=True)]


def local(tensor: Tensor) -> Tensor:
    """What lies on this rank, as it lies in memory."""
    return flat(tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def _like(grad: Tensor, param: Tensor) -> Tensor:
    if isinstance(grad, DTensor):
        grad = grad.to_local()
    if isinstance(param, DTensor):
        param = param.to_local()
    if grad.stride() != param.stride():
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return flat(grad)


class Plan:
    """The buckets of one set of parameters with gradients, and whether they still hold.

    Args:
        groups: the optimizer's.
        state: the optimizer's; gets zeros for parameters that make their first step.
        params: in the optimizer's order.
        grads: of params; those without one are left out.
        group_of: the index of each parameter's group.
        first: the number of the first parameter in the optimizer.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        state: Any,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        group_of: Sequence[int],
        first: int = 0,
    ) -> None:
        self.params = list(params)
        self.present = [grad is not None for grad in grads]
        self.flags = _flags(groups)
        chosen = [i for i, grad in enumerate(grads) if grad is not None and params[i].numel()]
        self.sizes = list(map(Tensor.numel, self.params))
        for i in chosen:
            _complete(state[params[i]], params[i], groups[group_of[i]])
        _share_steps([state[params[i]] for i in chosen])
        found: dict[Format, list[int]] = {}
        for i in chosen:
            found.setdefault(_format(params[i], grads[i], groups[group_of[i]]), []).append(i)
        self.buckets = []
        for form, positions in found.items():
            own = [state[params[i]] for i in positions]
            names = options.expected_state(params[positions[0]], groups[group_of[positions[0]]])
            bucket = Bucket(
                form,
                positions,
                [first + i for i in positions],
                [group_of[i] for i in positions],
                [params[i] for i in positions],
                {name: [entry[name] for entry in own] for name in ("step", *names)},
            )
            self.buckets.append(bucket)
        self._entries = list(state.values())
        self._own = [[state[param] for param in bucket.params] for bucket in self.buckets]

    def unique_steps(self) -> list[Tensor]:
        """The step tensors of all buckets, each once."""
        steps = {id(step): step for bucket in self.buckets for step in bucket.unique_steps}
        return list(steps.values())

    def holds(
        self,
        groups: Sequence[dict[str, Any]],
        state: Any,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
    ) -> bool:
        """True if nothing that the buckets rest on has been replaced."""
        if not _same(params, self.params) or _flags(groups) != self.flags:
            return False
        if [grad is not None for grad in grads] != self.present:
            return False
        if list(map(Tensor.numel, params)) != self.sizes:  # .data was replaced
            return False
        if not _same(list(state.values()), self._entries):
            return False
        for bucket, own in zip(self.buckets, self._own, strict=True):
            if set(map(_DTYPE, (grads[i] for i in bucket.positions))) != {bucket.format.grad}:
                return False
            for name, tensors in bucket.state.items():
                if not _same([entry.get(name) for entry in own], tensors):
                    return False
        return True


def _complete(own: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    """Give a parameter the state that it lacks, and refuse what does not fit: a kernel would read
    beyond it.
    """
    if "step" not in own:
        own["step"] = torch.zeros((), dtype=torch.float32)
    fresh = options.new_state(param, group, without=own)
    for name, (dtype, shape) in options.expected_state(param, group).items():
        tensor = own.get(name, fresh.get(name))
        if not isinstance(tensor, Tensor) or (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            found = type(tensor).__name__
            if isinstance(tensor, Tensor):
                found = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(
                f"state: expected {name} in {dtype} {list(shape)} for a parameter in {param.dtype} "
                f"{list(param.shape)}, got {found}; was the parameter or a group's option changed?"
            )
    own.update(fresh)


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _flags(groups: Sequence[dict[str, Any]]) -> list[Any]:
    names = ("amsgrad", "maximize", "moments", "rounding", "capturable")
    return [tuple(group[name] for name in names) for group in groups]


def _format(param: Tensor, grad: Any, group: dict[str, Any]) -> Format:
    return Format(
        param.device,
        param.dtype,
        grad.dtype,
        options.moment_dtype(param, group),
        options.rounding_of(param, group),
        group["amsgrad"],
        group["maximize"],
    )


def _share_steps(states: Sequence[dict[str, Any]]) -> None:
    """Parameters that step together from the same number share one tensor for it.

    A fresh one: parameters that do not step now keep theirs.
    """
    shared: dict[tuple[float, torch.device], Tensor] = {}
    known: dict[int, float] = {}  # reading a tensor on a device waits for it: once each
    for own in states:
        step = own["step"]
        if id(step) not in known:
            known[id(step)] = float(step)
        key = (known[id(step)], step.device)
        if key not in shared:
            shared[key] = torch.tensor(key[0], dtype=torch.float32, device=step.device)
    for own in states:
        own["step"] = shared[known[id(own["step"])], own["step"].device]

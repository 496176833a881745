"""Deferred groups: LoRA layers that share an input are computed by one op.

When the first of them is called, one op computes the outputs of all; the others hand theirs out
when they are called with the very same input. The parent's forward is never touched, so this works
for any architecture. Which layers belong together is found by watching: children of one parent that
were called with the same tensor object in an earlier forward.

Rules:

- Gradient checkpointing recomputes a forward inside backward and has to find what that forward saw.
  So groups are formed and shrunk outside backward only, and only when no earlier call of the
  siblings still waits for its backward.
- Whoever is called first leads. There is one slot of waiting outputs per thread. What nobody
  fetched goes at the next forward, and after a recomputation at the end of the backward.
- An output is handed out only if nothing it depends on has changed: the input (the object and its
  version), the modes of autograd and autocast, and the member's own adapters, parameters and their
  versions, scalings and dropout. Else the member computes alone.
- A member that has a hook, a base with a forward of its own or DoRA computes alone; one without an
  active adapter takes part as a plain product.
- A member whose output nobody fetched leaves the group, and gets no gradient meanwhile.
- Groups live beside the modules, never in them: they are not copied, pickled or saved.

What is different: the outputs share one autograd node, so ``q.backward(); k.backward()`` without
retain_graph raises as a second backward does; ``fasttune.patch(model, groups=False)`` avoids it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fasttune import _torch
from fasttune.ops import LoraProjection

# What a layer would compute for an input as a member of a group; None if it computes alone.
Describe = Callable[[nn.Module, Any], LoraProjection | None]
Member = tuple[nn.Module, LoraProjection]

_siblings: weakref.WeakKeyDictionary[nn.Module, _Siblings] = weakref.WeakKeyDictionary()


def register(families: Iterable[Sequence[nn.Module]]) -> None:
    """Watch the layers of each sequence, children of one parent, together."""
    for layers in families:
        known = {id(_siblings.get(layer)) for layer in layers}
        if len(layers) < 2 or (len(known) == 1 and layers[0] in _siblings):
            continue
        shared = _Siblings()
        for layer in layers:
            _siblings[layer] = shared


def forget(layers: Iterable[nn.Module]) -> None:
    """Compute these layers alone from now on."""
    for layer in layers:
        _siblings.pop(layer, None)


def members_of(layer: nn.Module) -> list[nn.Module]:
    """The layers that are computed together with this one, itself first; empty if it is alone."""
    siblings = _siblings.get(layer)
    return [] if siblings is None else siblings.group_of(layer)


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """What is learnt about the layers of a model inside is forgotten afterwards."""
    before = {layer: _siblings[layer] for layer in model.modules() if layer in _siblings}
    inside = {id(siblings): siblings.copy() for siblings in before.values()}
    for layer, siblings in before.items():
        _siblings[layer] = inside[id(siblings)]
    try:
        yield
    finally:
        for layer, siblings in before.items():
            if layer in _siblings:
                _siblings[layer] = siblings


def fetch(layer: nn.Module, x: Any, describe: Describe) -> Tensor | None:
    """The output of ``layer`` for x if a sibling has computed it and nothing has changed since."""
    siblings = _siblings.get(layer)
    waiting = None if siblings is None else siblings.waiting.get(threading.get_ident())
    if waiting is None or layer not in waiting.outputs:
        return None
    y, then, versions = waiting.outputs.pop(layer)
    if not waiting.outputs and siblings is not None:
        del siblings.waiting[threading.get_ident()]
    if x is None or waiting.x() is not x or _facts_of_input(x) != waiting.facts:
        return None
    projection = describe(layer, x)
    if projection is None or _versions(projection) != versions:
        return None
    if projection is not then and not _same(_facts_of(projection), _facts_of(then)):
        return None
    return y


def gather(
    layer: nn.Module, x: Tensor, own: LoraProjection, describe: Describe, *, alone: bool
) -> list[Member]:
    """Who is computed now, ``layer`` first, and what each computes.

    ``alone``: the layer leads no group.
    """
    siblings = _siblings.get(layer)
    if siblings is None or x.is_inference():
        return [(layer, own)]
    if not _torch.inside_backward() and siblings.open.none():
        siblings.settle()
    others = siblings.group_of(layer)[1:]
    if not others or alone:
        return [(layer, own)]
    described = [(member, describe(member, x)) for member in others]
    return [(layer, own), *((m, p) for m, p in described if p is not None)]


def keep(members: Sequence[Member], x: Tensor, ys: Sequence[Tensor]) -> None:
    """Keep the outputs of all but the first of ``members``, and watch who is called with what."""
    leader = members[0][0]
    siblings = _siblings.get(leader)
    if siblings is None or x.is_inference():
        return
    recomputing = _torch.inside_backward()
    siblings.open.add(ys[0], recomputing)
    if len(members) > 1:
        outputs = {
            member: (y, projection, _versions(projection))
            for (member, projection), y in zip(members[1:], ys[1:], strict=True)
        }
        siblings.wait(x, outputs, recomputing)
    elif not recomputing:
        siblings.watch(leader, x)


@dataclass
class _Waiting:
    """The outputs of one op that wait to be fetched, each with what its member computed."""

    x: weakref.ref[Tensor]
    facts: Any  # of the input and the modes
    outputs: dict[nn.Module, tuple[Tensor, LoraProjection, list[int]]]
    recomputed: bool  # inside backward, where a checkpoint stops as soon as it has all it needs


class _Open:
    """Calls whose backward is still to come: until then, membership must not change."""

    def __init__(self) -> None:
        self._nodes: list[weakref.ref[Any]] = []
        self._without_graph = 0  # calls in a checkpoint that keeps no graph, not yet recomputed

    def add(self, y: Tensor, recomputing: bool) -> None:
        if recomputing:
            self._without_graph = max(self._without_graph - 1, 0)
        elif y.grad_fn is None:
            self._without_graph += 1
        else:
            self._nodes.append(weakref.ref(y.grad_fn))

    def none(self) -> bool:
        self._nodes = [node for node in self._nodes if _waits_for_backward(node())]
        return not self._nodes and not self._without_graph


def _waits_for_backward(node: Any) -> bool:
    return node is not None and not node.ran


@dataclass
class _Siblings:
    """The LoRA layers of one parent.

    Attributes:
        groups: of layers that are computed together, in the order in which they were called.
        run: called with one and the same input so far, which is ``run_input`` at a version.
        runs: earlier runs, to become groups.
        waiting: by thread.
        unfetched: members whose output of a forward was not needed.
    """

    groups: list[list[weakref.ref[nn.Module]]] = field(default_factory=list)
    run: list[weakref.ref[nn.Module]] = field(default_factory=list)
    run_input: tuple[weakref.ref[Tensor], int] | None = None
    runs: list[list[weakref.ref[nn.Module]]] = field(default_factory=list)
    waiting: dict[int, _Waiting] = field(default_factory=dict)
    unfetched: list[weakref.ref[nn.Module]] = field(default_factory=list)
    open: _Open = field(default_factory=_Open)

    def copy(self) -> _Siblings:
        """The same groups, nothing else."""
        return _Siblings(groups=[list(group) for group in self.groups])

    def group_of(self, layer: nn.Module) -> list[nn.Module]:
        for group in self.groups:
            members = [member for known in group if (member := known()) is not None]
            if any(member is layer for member in members):
                return [layer, *(member for member in members if member is not layer)]
        return []

    def watch(self, layer: nn.Module, x: Tensor) -> None:
        seen, version = self.run_input or (None, 0)
        if seen is None or seen() is not x or version != x._version:
            self._end_run()
            self.run_input = (weakref.ref(x), x._version)
        if all(known() is not layer for known in self.run):
            self.run.append(weakref.ref(layer))

    def _end_run(self) -> None:
        if len(self.run) > 1:
            self.runs.append(self.run)
        self.run, self.run_input = [], None

    def settle(self) -> None:
        """Between forwards: members that nobody fetched leave, what was seen together joins."""
        self._note_unfetched()
        gone = {id(known()) for known in self.unfetched}
        groups = [[known for known in group if id(known()) not in gone] for group in self.groups]
        self.groups = [group for group in groups if len(group) > 1]
        self.unfetched = []
        self._end_run()
        for run in self.runs:
            members = [known() for known in run]
            if all(member is not None and not self.group_of(member) for member in members):
                self.groups.append(run)
        self.runs = []

    def _note_unfetched(self) -> None:
        left = self.waiting.pop(threading.get_ident(), None)
        if left is not None and not left.recomputed:
            self.unfetched += map(weakref.ref, left.outputs)

    def wait(self, x: Tensor, outputs: Any, recomputed: bool) -> None:
        thread = threading.get_ident()
        self._note_unfetched()
        waiting = _Waiting(weakref.ref(x), _facts_of_input(x), outputs, recomputed)
        self.waiting[thread] = waiting

        def let_go() -> None:
            if self.waiting.get(thread) is waiting:
                del self.waiting[thread]

        if recomputed:
            _torch.after_backward(let_go)


def _facts_of_input(x: Any) -> Any:
    return x._version, torch.is_grad_enabled(), _torch.autocast_dtype(x.device.type)


def _tensors(projection: LoraProjection) -> list[Tensor | None]:
    tensors = [projection.weight, projection.bias]
    for branch in projection.branches:
        tensors += [branch.a, branch.b, branch.bias]
        if isinstance(branch.scaling, Tensor):
            tensors.append(branch.scaling)
    return tensors


def _versions(projection: LoraProjection) -> list[int]:
    """How often each tensor of a projection has been written to."""
    return [-1 if tensor is None else tensor._version for tensor in _tensors(projection)]


def _facts_of(projection: LoraProjection) -> list[Any]:
    """Everything that the output of a projection depends on but the input and the versions."""
    facts: list[Any] = [branch.dropout_p for branch in projection.branches]
    facts += [b.scaling for b in projection.branches if not isinstance(b.scaling, Tensor)]
    # Conv1D's weight is a view
    facts += [t if t is None or t._base is None else t._base for t in _tensors(projection)]
    return facts


def _same(these: list[Any], those: list[Any]) -> bool:
    """Equal numbers and identical tensors."""
    return len(these) == len(those) and all(
        a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
        for a, b in zip(these, those, strict=True)
    )

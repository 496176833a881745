"""What calls of the same projections have in common is kept no longer than they live."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import weakref

import pytest
import torch

from fasttune.ops import LoraBranch, LoraProjection, lora_linear_group

op = importlib.import_module("fasttune.ops.lora_linear")
X = torch.randn(5, 8)


def projection(rank: int = 2) -> LoraProjection:
    branch = LoraBranch(torch.randn(rank, 8), torch.randn(6, rank))
    return LoraProjection(torch.randn(6, 8), None, (branch,))


def truth(p: LoraProjection) -> torch.Tensor:
    y = X @ p.weight.t() if p.weight is not None else torch.zeros(5, 6)
    return y + sum(X @ branch.a.t() @ branch.b.t() for branch in p.branches)


@pytest.fixture(autouse=True)
def no_collector():
    gc.disable()
    yield
    gc.enable()


def check(projections: list[LoraProjection]) -> None:
    for y, p in zip(lora_linear_group(X, projections), projections, strict=True):
        torch.testing.assert_close(y, truth(p))


def test_the_same_projections_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = op._new_spec_of
    monkeypatch.setattr(op, "_new_spec_of", lambda *args: made.append(0) or original(*args))
    p, q = projection(), projection(3)
    for together in ([p, q], [p, q], [p], [p], [q, p], [q, p]):
        check(together)
    assert len(made) == 3


def test_neither_projections_nor_tensors_are_kept() -> None:
    before = len(op._packs)
    p, q = projection(), projection()
    check([p, q])
    check([q, p])
    check([p, p])
    known = [weakref.ref(it) for it in (p, q, p.weight, q.weight)]
    del q
    assert known[1]() is None and known[3]() is None  # while p lives
    del p
    assert all(ref() is None for ref in known)
    assert len(op._packs) == before


def test_a_list_of_branches_may_be_changed() -> None:
    p = projection()
    branches = list(p.branches)
    q = LoraProjection(p.weight, None, branches)  # type: ignore[arg-type]
    check([q])
    branches.append(LoraBranch(torch.randn(3, 8), torch.randn(6, 3)))
    check([q])


def test_copies_hold_nothing_else() -> None:
    p, q = projection(), projection()
    size = len(pickle.dumps(p))
    check([p, q])
    assert len(pickle.dumps(p)) == size
    for copied in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        check([copied, q])

"""Rotary embedding functions: found by their signature, proven by their values."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttune import _registry
from fasttune.ops.rope import rope
from fasttune.patching import guard, probe

_BATCH, _HEADS, _KV_HEADS, _TOKENS, _FEATURES = 2, 4, 2, 5, 16


@dataclass(frozen=True)
class Rotation:
    """What a rotary function computes of (q, k, cos, sin), q and k [B, H, S, D].

    Attributes:
        interleaved: pairs are neighbours; else they are half the width apart.
        tables: how cos and sin hold the angles: "full" as wide as what they turn; "halves": so
            wide, but only the first half is read and repeated pairwise; "narrow": each angle once.
        partial: features beyond the width of cos are passed through.
        proven: (dtype of q and k, dtype of cos and sin) whose result has the dtype of q.
        widened: likewise, whose result is that of q and k in the wider dtype of cos and sin: under
            autocast, projections are 16 bits and angles fp32.
    """

    interleaved: bool
    tables: str
    partial: bool
    proven: frozenset[tuple[torch.dtype, torch.dtype]]
    widened: frozenset[tuple[torch.dtype, torch.dtype]] = frozenset()

    def angles(self, table: Tensor) -> Tensor:
        """cos or sin as :func:`fasttune.ops.rope` takes them."""
        if self.tables == "full":
            return table
        if self.tables == "narrow":
            return torch.cat([table, table], dim=-1)
        return table[..., : table.shape[-1] // 2].repeat_interleave(2, dim=-1)


def looks_rotary(function: Any) -> bool:
    """True for a function of (q, k, cos, sin, ...) with defaults for the rest."""
    if not isinstance(function, types.FunctionType):
        return False
    parameters = list(inspect.signature(function).parameters.values())
    if [p.name for p in parameters[2:4]] != ["cos", "sin"]:
        return False
    return all(p.default is not p.empty for p in parameters[4:])


def prove(function: Any) -> Rotation | None:
    """The rotation that a function computes, or None."""
    for interleaved, tables in (
        *((False, "full"), (True, "full")),
        *((True, "halves"), (False, "narrow")),
    ):
        rotation = Rotation(interleaved, tables, False, frozenset())
        if not _agrees(function, rotation, _FEATURES, torch.float32, torch.float32):
            continue
        return Rotation(
            interleaved,
            tables,
            tables != "narrow"
            and _agrees(function, rotation, _FEATURES // 2, torch.float32, torch.float32),
            frozenset(_proven(function, rotation, widen=False)),
            frozenset(_proven(function, rotation, widen=True)),
        )
    return None


def _proven(
    function: Any, rotation: Rotation, *, widen: bool
) -> Iterator[tuple[torch.dtype, torch.dtype]]:
    for x in guard.FLOATS:
        for table in guard.FLOATS:
            wider = x != table == torch.float32
            if (wider or not widen) and _agrees(function, rotation, _FEATURES, x, table, widen):
                yield x, table


def _agrees(
    function: Any,
    rotation: Rotation,
    turned: int,
    x: torch.dtype,
    table: torch.dtype,
    widen: bool = False,
) -> bool:
    random = probe.generator()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device="cpu")

    q = draw(_BATCH, _HEADS, _TOKENS, _FEATURES).to(x)
    k = draw(_BATCH, _KV_HEADS, _TOKENS, _FEATURES).to(x)
    repeats = 2 if rotation.interleaved and rotation.tables == "full" else 1
    columns = turned // (2 if rotation.tables == "narrow" else repeats)
    cos, sin = (
        draw(_BATCH, _TOKENS, columns).repeat_interleave(repeats, -1).to(table) for _ in range(2)
    )
    with probe.quiet():
        try:
            theirs = function(q.clone(), k.clone(), cos, sin)
        except probe.ANY_ERROR:
            return False
        if widen:
            q, k = q.to(table), k.to(table)
        with _registry.use_backend("reference"):
            ours = rope(
                q, k, rotation.angles(cos), rotation.angles(sin), interleaved=rotation.interleaved
            )
    if not isinstance(theirs, tuple) or len(theirs) != 2:
        return False
    exact = q.dtype == table == torch.float32
    return all(_same(a, b, exact) for a, b in zip(ours, theirs, strict=True) if a is not None)


def _same(ours: Tensor, theirs: Any, exact: bool) -> bool:
    if not isinstance(theirs, Tensor) or theirs.dtype != ours.dtype or theirs.shape != ours.shape:
        return False
    if exact:
        return torch.equal(ours, theirs)
    # Theirs rounds both products and the sum, ours once.
    unit = 4 * torch.finfo(torch.bfloat16 if ours.dtype != torch.float16 else ours.dtype).eps
    return bool((ours.double() - theirs.double()).abs().max() <= unit * theirs.abs().max())

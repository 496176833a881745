"""Which rows belong to which branch: runs of rows, or rows gathered by branch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

# Where every segment is a handful of calls on a rank-sized problem, gathering the rows of each
# branch (one read and one write of x, y, dy and dx) costs less than calling beyond this many.
MAX_SEGMENTS = 64

BASE = -1  # of a row without a branch


@dataclass(frozen=True)
class Plan:
    """The assignment of a batch.

    Attributes:
        used: indices of the branches that have a row, ascending.
        segments: (start, stop, position in ``used``) of runs of rows, ascending and disjoint.
        order: None if the segments count the rows of the batch; else the rows of the batch, by
            branch, whose places the segments count.
    """

    used: tuple[int, ...]
    segments: tuple[tuple[int, int, int], ...]
    order: tuple[int, ...] | None


def assignment(
    rows_of: Tensor | Sequence[int], samples: int, rows: int, branches: int
) -> list[int]:
    """``rows_of`` as a checked list of ``samples`` or ``rows`` branch indices.

    Raises:
        TypeError: it is no int64 tensor or sequence of integers.
        ValueError: its length fits neither, or an index is no branch and not -1.
    """
    if isinstance(rows_of, Tensor):
        if rows_of.is_floating_point() or rows_of.is_complex():
            raise TypeError(f"rows_of: expected integers, got {rows_of.dtype}")
        given = rows_of.flatten().tolist()
    else:
        given = list(rows_of)
    for index in given:
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"rows_of: expected integers, got {type(index).__name__}")
        if not BASE <= index < branches:
            raise ValueError(f"rows_of: expected -1 or a branch below {branches}, got {index}")
    if len(given) not in (samples, rows):
        expected = f"{samples}" if samples == rows else f"{samples} (samples) or {rows} (rows)"
        raise ValueError(f"rows_of: expected {expected} entries, got {len(given)}")
    return given


def plan(given: Sequence[int], rows: int) -> Plan:
    """The segments of ``rows`` rows whose equal parts are assigned by ``given``."""
    per = rows // len(given) if given else 0
    runs, at = [], 0
    for index, group in groupby(given):
        stop = at + per * sum(1 for _ in group)
        if index != BASE and stop > at:
            runs.append((at, stop, index))
        at = stop
    used = tuple(sorted({index for _, _, index in runs}))
    place = {index: position for position, index in enumerate(used)}
    if len(runs) <= MAX_SEGMENTS or len(runs) == len(used):
        return Plan(used, tuple((start, stop, place[index]) for start, stop, index in runs), None)
    gathered: list[list[int]] = [[] for _ in used]
    for start, stop, index in runs:
        gathered[place[index]] += range(start, stop)
    segments, at = [], 0
    for position, members in enumerate(gathered):
        segments.append((at, at + len(members), position))
        at += len(members)
    return Plan(used, tuple(segments), tuple(row for members in gathered for row in members))


def triples(flat: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, stop, branch) of every segment, from the flat list that an op takes."""
    return list(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))


def gaps(segments: Sequence[tuple[int, int, int]], rows: int) -> list[tuple[int, int]]:
    """The runs of rows outside every segment; ``segments`` ascend."""
    found, at = [], 0
    for start, stop, _ in segments:
        if start > at:
            found.append((at, start))
        at = stop
    return [*found, (at, rows)] if rows > at else found

"""What the kernels of `lora_segmented` read about a batch: its rows, branches and tiles as tables.

The rows of a branch need not be neighbours. They are counted by *place*: the rows of branch 0, then
those of branch 1, ..., each in ascending order. `rows` gives the row of a place, and the rank-sized
values of a batch (t, d) lie in one buffer by place, [P_0, R_0], [P_1, R_1], ...

Tables are made on the host, copied without waiting for the device, and kept for the next call with
the same assignment: all layers of a step share those of rows and tiles, and all steps with the same
assignment share those of branches.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import triton.language as tl
from torch import Tensor

from .multi_tensor import ELEMENT
from .multi_tensor_tables import aligned, uploaded
from .tables import divide_up

# The columns of a branch's row, int64. Scales are the bits of an fp32 number.
A = tl.constexpr(0)  # address of A [R, K]
B = tl.constexpr(1)  # address of B [N, R]
RANK = tl.constexpr(2)
OFFSET = tl.constexpr(3)  # of place 0 in the buffer of rank-sized values, were it the branch's
SCALE = tl.constexpr(4)  # with 1 / (1 - p)
SCALE_TENSOR = tl.constexpr(5)  # address of a 0-d factor of both scales, or 0
THRESHOLD = tl.constexpr(6)
STREAM = tl.constexpr(7)  # of its random bits
BIAS = tl.constexpr(8)  # address of the lora bias [N], or 0
BIAS_SCALE = tl.constexpr(9)  # without 1 / (1 - p)
COLUMNS = tl.constexpr(10)

# The columns of a tile's row, int32.
BRANCH = tl.constexpr(0)
FIRST = tl.constexpr(1)  # place
STOP = tl.constexpr(2)
FIRST_RANK = tl.constexpr(3)
BASE = tl.constexpr(4)  # ranks of the results before it: see `Tiles`
TILE = tl.constexpr(5)


@dataclass(frozen=True)
class Branches:
    """The adapters of a batch, in the order of their indices.

    Attributes:
        a, b: [R, K] and [N, R] of each.
        scalings: of each, without dropout; times ``scale_tensors``, 0-d or None for 1.
        keep_scales: 1 / (1 - p) of each.
        thresholds, streams: of each branch's dropout: a lane below the threshold is dropped.
        lora_biases: [N] of each, or None.
    """

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scalings: Sequence[float]
    scale_tensors: Sequence[Tensor | None]
    keep_scales: Sequence[float]
    thresholds: Sequence[int]
    streams: Sequence[int]
    lora_biases: Sequence[Tensor | None]


@dataclass(frozen=True)
class Places:
    """How the rows of a batch are counted.

    Attributes:
        counts: rows of each branch.
        firsts: the first place of each branch, and the number of places.
        segments: (first place, rows, branch) of each segment, in the order given.
        rows: of the places, or None where the device has them already.
    """

    counts: tuple[int, ...]
    firsts: tuple[int, ...]
    segments: tuple[tuple[int, int, int], ...]
    rows: tuple[tuple[int, int], ...] | None


@lru_cache(maxsize=64)
def places_of(segments: tuple[int, ...], branches: int, ordered: bool) -> Places:
    """The places of (start, stop, branch) triples; ``ordered`` says that they count places."""
    triples = list(zip(segments[0::3], segments[1::3], segments[2::3], strict=True))
    counts = [0] * branches
    for start, stop, j in triples:
        counts[j] += stop - start
    firsts = list(accumulate(counts, initial=0))
    at, found = firsts[:], []
    for start, stop, j in triples:
        found.append((at[j], stop - start, j))
        at[j] += stop - start
    runs = None
    if not ordered:
        by_branch = sorted(triples, key=lambda triple: triple[2])  # stable: rows ascend
        runs = tuple((start, stop) for start, stop, _ in by_branch)
    return Places(tuple(counts), tuple(firsts), tuple(found), runs)


def _stream_of(device: torch.device) -> int:
    """Tables are kept by stream: what another stream copies has perhaps not arrived."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=64)
def _rows(runs: tuple[tuple[int, int], ...], device: torch.device, stream: int) -> Tensor:
    return uploaded(torch.cat([torch.arange(*run) for run in runs]), device)


@lru_cache(maxsize=1024)
def _branch_table(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    return uploaded(torch.tensor(rows), device)


@dataclass(frozen=True)
class Tiles:
    """Stretches of places, one branch each, that programs take.

    The results of a reduction over each tile are R rows; those of a branch's tiles follow one
    another, and ``BASE`` counts the rows before a tile's.

    Attributes:
        table: [tiles, TILE] int32.
        sums: [members, 5] int32: base, number of tiles, rank, the ranks of the members before, and
            the branch.
        single: whether each branch is one tile, so that there is nothing to add.
        results: rows of the results of all tiles.
    """

    table: Tensor
    sums: Tensor
    single: bool
    results: int


@lru_cache(maxsize=256)
def _tiles(
    firsts: tuple[int, ...],
    ranks: tuple[int, ...],
    members: tuple[int, ...],
    rows: int,
    block_r: int,
    device: torch.device,
    stream: int,
) -> Tiles:
    table, sums, base, before = [], [], 0, 0
    for j in members:
        start, stop = firsts[j], firsts[j + 1]
        sums.append((base, divide_up(stop - start, rows), ranks[j], before, j))
        before += ranks[j]
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            # Programs that read the same rows are neighbours, so that the second read hits L2.
            table += [(j, first, last, rank, base) for rank in range(0, ranks[j], block_r)]
            base += ranks[j]
    single = all(count == 1 for _, count, *_ in sums)
    pair = (uploaded(torch.tensor(each, dtype=torch.int32), device) for each in (table, sums))
    return Tiles(*pair, single, base)


@dataclass(frozen=True)
class Batch:
    """Everything about a batch that its kernels share; see :func:`batch_of`."""

    places: Places
    ranks: tuple[int, ...]
    offsets: tuple[int, ...]  # of the rank-sized values of each branch, and their number
    rows: Tensor  # [P] int64
    by_place: bool  # whether dropout counts rows by place
    branches: Tensor  # [J, COLUMNS] int64
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    scale: tl.dtype | None  # of the scale tensors
    bias: tl.dtype | None  # of the lora biases
    dropout: bool
    aligned: bool  # addresses of factors allow accesses of 16 bytes
    eights: bool  # and every rank is a multiple of 8

    def tiles(
        self, rows: int, block_r: int, members: Sequence[int] | None = None, *, rank: int = 0
    ) -> Tiles:
        """Tiles of at most so many rows and ranks; of ``rank`` if given, of all ``members``."""
        device = self.rows.device
        ranks = (rank,) * len(self.ranks) if rank else self.ranks
        chosen = range(len(ranks)) if members is None else members
        facts = (self.places.firsts, ranks, tuple(chosen), rows, block_r)
        return _tiles(*facts, device, _stream_of(device))

    def by_segment(self, thin: Tensor) -> list[Tensor]:
        """[rows, R] of every segment, views of the buffer."""
        return [
            thin[at : at + rows * self.ranks[j]].view(rows, self.ranks[j])
            for at, (_, rows, j) in zip(self._offsets(), self.places.segments, strict=True)
        ]

    def _offsets(self) -> list[int]:
        return [
            self.offsets[j] + (first - self.places.firsts[j]) * self.ranks[j]
            for first, _, j in self.places.segments
        ]

    def buffer_of(self, parts: Sequence[Tensor | None]) -> Tensor:
        """The buffer whose views ``parts`` are, or a copy of them; contents of None are undefined.

        What a saved-tensor hook returns is a tensor of its own.
        """
        at = self._offsets()
        start = parts[at.index(0)]
        if start is not None and all(
            part is not None
            and part.is_contiguous()
            and part.untyped_storage().data_ptr() == start.untyped_storage().data_ptr()
            and part.data_ptr() == start.data_ptr() + offset * part.element_size()
            for part, offset in zip(parts, at, strict=True)
        ):
            return start
        given = [
            self.rows.new_empty(rows * self.ranks[j], dtype=torch.float32)
            if part is None
            else part.reshape(-1)
            for part, (_, rows, j) in zip(parts, self.places.segments, strict=True)
        ]
        return torch.cat([given[i] for i in sorted(range(len(at)), key=at.__getitem__)])


def _bits(scale: float) -> int:
    return int.from_bytes(struct.pack("<f", scale), "little")


def _element_of(tensors: Sequence[Tensor | None]) -> tuple[bool, tl.dtype | None]:
    """Whether a kernel can read these by address, and their one dtype, None if there are none."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtypes = {tensor.dtype for tensor in given}
    fit = len(dtypes) < 2 and dtypes <= ELEMENT.keys() and all(t.is_contiguous() for t in given)
    return fit, ELEMENT[dtypes.pop()] if fit and dtypes else None


def batch_of(segments: Sequence[int], order: Tensor | None, branches: Branches) -> Batch | None:
    """The tables of a batch, or None where its branches do not fit one kernel: factors of several
    dtypes or not contiguous, and while a CUDA graph is captured, which must not copy them.

    Args:
        segments: start, stop and branch of each run of rows, ascending; not empty.
        order: [P] int64, the rows of the batch by branch, whose places the segments count.
        branches: of the batch.
    """
    device = branches.a[0].device
    lists = (branches.a, branches.b, branches.scale_tensors, branches.lora_biases)
    (fit_a, _), (fit_b, _), (fit_scale, scale), (fit_bias, bias) = map(_element_of, lists)
    if not (fit_a and fit_b and fit_scale and fit_bias):
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    places = places_of(tuple(segments), len(branches.a), order is not None)
    ranks = tuple(factor.shape[0] for factor in branches.a)
    if min(ranks) < 1 or not places.firsts[-1]:
        return None
    sizes = (count * rank for count, rank in zip(places.counts, ranks, strict=True))
    offsets = tuple(accumulate(sizes, initial=0))
    table = tuple(
        (
            branches.a[j].data_ptr(),
            branches.b[j].data_ptr(),
            rank,
            offsets[j] - places.firsts[j] * rank,
            _bits(branches.scalings[j] * branches.keep_scales[j]),
            _address(branches.scale_tensors[j]),
            branches.thresholds[j],
            branches.streams[j],
            _address(branches.lora_biases[j]),
            _bits(branches.scalings[j]),
        )
        for j, rank in enumerate(ranks)
    )
    stream = _stream_of(device)
    if order is None:
        assert places.rows is not None
        order = _rows(places.rows, device, stream)
    eights = all(rank % 8 == 0 for rank in ranks)
    return Batch(
        places=places,
        ranks=ranks,
        offsets=offsets,
        rows=order,
        by_place=places.rows is None,
        branches=_branch_table(table, device, stream),
        a_dtype=branches.a[0].dtype,
        b_dtype=branches.b[0].dtype,
        scale=scale,
        bias=bias,
        dropout=any(branches.thresholds),
        aligned=aligned([*branches.a, *branches.b]),
        eights=eights,
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

"""The kernels that take all segments of a batch: values beyond conformance, launches, machine code.

Conformance (`tests/test_conformance.py`) runs the op itself in the interpreter; here are the sizes
it does not reach, and what a launch is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

import fasttune
from fasttune.ops import LoraBranch, _dropout, _triton, lora_segmented
from fasttune.testing.triton_compile import (
    GPU_LIMITS,
    count_global_loads,
    count_global_stores,
    count_tensor_core,
)
from fasttune.testing.triton_dry_run import Launch, dry_run
from fasttune.testing.triton_interpreter import interpreted
from fasttune_kernels import lora_segmented as kernels
from fasttune_kernels import lora_segments as tables

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMED = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
THRESHOLD = 3277
SUMS = ("_sum_partials_kernel", "_lora_segmented_sum_kernel")


class Operands:
    """A layer whose branches own the given runs of rows, (start, stop, branch) each."""

    def __init__(
        self,
        rows: int,
        runs: Sequence[tuple[int, int, int]],
        ranks: Sequence[int],
        *,
        k: int = 40,
        n: int = 48,
        x: torch.dtype = BF16,
        factor: torch.dtype = FP32,
        threshold: int = THRESHOLD,
    ) -> None:
        generator = torch.Generator().manual_seed(rows)

        def randn(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.runs, self.ranks, self.threshold = runs, ranks, threshold
        self.x, self.dy = randn(rows, k, dtype=x), randn(rows, n, dtype=x)
        self.a = [randn(r, k, dtype=factor) for r in ranks]
        self.b = [randn(n, r, dtype=factor) for r in ranks]
        self.scalings = [1.5 - j / 4 for j in range(len(ranks))]
        self.seed = torch.tensor(-81985529216486896)

    def batch(self) -> tables.Batch:
        count = len(self.ranks)
        thresholds = [self.threshold] * count
        branches = tables.Branches(
            *(self.a, self.b, self.scalings, [None] * count),
            *([_dropout.keep_scale(each) for each in thresholds], thresholds),
            *(range(count), [None] * count),
        )
        batch = tables.batch_of([n for run in self.runs for n in run], None, branches)
        assert batch is not None
        return batch

    def results(self) -> dict[str, list[Tensor]]:
        batch, seed = self.batch(), self.seed if self.threshold else None
        t = kernels.down(batch, self.x, tables.A, seed)
        y, dx = self.dy.clone(), self.x.clone()
        kernels.up(batch, t, y, tables.B, add=True)
        d = kernels.down(batch, self.dy, tables.B)
        kernels.up(batch, d, dx, tables.A, add=True, seed=seed)
        members = range(len(self.ranks))
        return {
            "t": batch.by_segment(t),
            "y": [y],
            "d": batch.by_segment(d),
            "db": kernels.weight_grads(batch, self.dy, t, members, tables.B),
            "dx": [dx],
            "da": kernels.weight_grads(batch, self.x, d, members, tables.A, seed),
            "sums": kernels.column_sums(batch, self.dy, members),
        }

    def truth(self) -> dict[str, list[Tensor]]:
        x, dy = self.x.double(), self.dy.double()
        a, b = ([factor.double() for factor in factors] for factors in (self.a, self.b))
        y, dx = dy.clone(), x.clone()
        das, dbs = ([torch.zeros_like(factor) for factor in factors] for factors in (a, b))
        sums = [torch.zeros_like(dy[0]) for _ in a]
        ts, ds = [], []
        for start, stop, j in self.runs:
            facts = (self.seed, self.threshold, stop - start, x.shape[1])
            keep = _dropout.keep_mask(*facts, branch=j, row_offset=start).double()
            scale = self.scalings[j] * _dropout.keep_scale(self.threshold)
            own = slice(start, stop)
            ts.append(scale * (x[own] * keep) @ a[j].t())
            ds.append(scale * dy[own] @ b[j])
            y[own] += ts[-1] @ b[j].t()
            dx[own] += keep * (ds[-1] @ a[j])
            das[j] += ds[-1].t() @ (x[own] * keep)
            dbs[j] += dy[own].t() @ ts[-1]
            sums[j] += self.scalings[j] * dy[own].sum(0)
        return {"t": ts, "y": [y], "d": ds, "db": dbs, "dx": [dx], "da": das, "sums": sums}


def assert_accurate(given: Operands) -> dict[str, list[Tensor]]:
    """Within the rounding of the result's dtype and of fp32 sums of so many terms."""
    with interpreted():
        ours = given.results()
    for name, exact in given.truth().items():
        assert len(ours[name]) == len(exact)
        for mine, right in zip(ours[name], exact, strict=True):
            assert mine.shape == right.shape
            terms = len(given.x) + max(given.ranks) + given.x.shape[1]
            allowed = torch.finfo(mine.dtype).eps + 4 * terms**0.5 * torch.finfo(FP32).eps
            scale = max(float(right.abs().max()), 1.0) if right.numel() else 1.0
            assert float((mine.double() - right).abs().max()) <= allowed * scale, name
    return ours


RUNS = [(0, 5, 1), (7, 30, 0), (30, 31, 2), (33, 40, 1)]


@pytest.mark.parametrize("threshold", [0, THRESHOLD])
@pytest.mark.parametrize(
    "dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP32), (FP16, FP16)]
)
@pytest.mark.usefixtures("nan_filled_allocations")
def test_runs_of_several_ranks(dtypes: tuple[torch.dtype, torch.dtype], threshold: int) -> None:
    x, factor = dtypes
    assert_accurate(Operands(43, RUNS, (3, 16, 8), x=x, factor=factor, threshold=threshold))


@pytest.mark.usefixtures("nan_filled_allocations")
def test_ranks_in_chunks() -> None:
    assert_accurate(Operands(43, RUNS, (130, 8, 256)))
    assert_accurate(Operands(43, RUNS, (1, 200, 24), x=FP32))


@pytest.mark.usefixtures("nan_filled_allocations")
def test_sums_in_several_tiles_and_splits() -> None:
    runs = [(0, 300, 0), (310, 320, 1), (320, 900, 0)]
    given = Operands(910, runs, (8, 4), k=24, n=16)
    with interpreted():
        assert not given.batch().tiles(256, 16).single
    assert_accurate(given)
    assert_accurate(Operands(20, [(1, 9, 1), (9, 20, 0)], (8, 4), k=1100, n=40))


@pytest.mark.usefixtures("nan_filled_allocations")
def test_a_branch_without_rows_gets_zeros() -> None:
    ours = assert_accurate(Operands(43, [(2, 20, 0), (25, 43, 2)], (8, 16, 8)))
    for name in ("da", "db", "sums"):
        assert torch.equal(ours[name][1], torch.zeros_like(ours[name][1]))


def test_rows_without_a_branch_are_neither_read_nor_written() -> None:
    given = Operands(43, RUNS, (3, 16, 8))
    clean = assert_accurate(given)
    base = [row for row in range(43) if not any(start <= row < stop for start, stop, _ in RUNS)]
    given.x[base] = given.dy[base] = torch.nan
    with interpreted():
        ours = given.results()
    for name in ("t", "d", "da", "db", "sums"):
        assert all(map(torch.equal, ours[name], clean[name])), name
    for name in ("y", "dx"):
        assert ours[name][0][base].isnan().all()
        own = [row for row in range(43) if row not in base]
        assert torch.equal(ours[name][0][own], clean[name][0][own])


def test_saved_values_that_a_hook_moved() -> None:
    given = Operands(43, RUNS, (3, 16, 8))
    with interpreted():
        batch = given.batch()
        t = kernels.down(batch, given.x, tables.A, given.seed)
        parts = batch.by_segment(t)
        assert batch.buffer_of(parts).data_ptr() == t.data_ptr()
        moved = batch.buffer_of([part.clone() for part in parts])
        assert moved.data_ptr() != t.data_ptr() and torch.equal(moved, t)
        without = batch.buffer_of([parts[0], None, *parts[2:]])
    of_none = 23 * 3  # rows and rank of the run, which is the first of the buffer
    assert torch.equal(without[of_none:], t[of_none:]) and len(without) == len(t)


def test_two_runs_are_bit_equal() -> None:
    given = Operands(910, [(0, 300, 0), (310, 320, 1), (320, 900, 0)], (8, 4), k=24, n=16)
    with interpreted():
        first, second = given.results(), given.results()
    for name, tensors in first.items():
        assert all(map(torch.equal, tensors, second[name])), name


@contextlib.contextmanager
def launches_of(capability: int) -> Iterator[list[Launch]]:
    """The op on CPU tensors launches nothing, and says what."""
    previous, _triton.accepts_cpu_tensors = _triton.accepts_cpu_tensors, True
    try:
        with dry_run(capability) as launches, fasttune.use_backend("triton"):
            yield launches
    finally:
        _triton.accepts_cpu_tensors = previous


def step(
    ranks: Sequence[int], rows_of: Sequence[int], factors: Sequence[torch.dtype] = (FP32,)
) -> list[str]:
    """What forward and backward of a layer launch."""
    k, n = 256, 320
    x = torch.randn(len(rows_of), 4, k, dtype=BF16).requires_grad_()
    weight = torch.randn(n, k, dtype=BF16)
    branches = [
        LoraBranch(
            torch.randn(rank, k, dtype=factors[j % len(factors)]).requires_grad_(),
            torch.randn(n, rank, dtype=factors[j % len(factors)]).requires_grad_(),
            dropout_p=0.1,
            bias=torch.randn(n).requires_grad_(),
        )
        for j, rank in enumerate(ranks)
    ]
    with launches_of(90) as launches:
        lora_segmented(x, weight, branches, rows_of).sum().backward()
    return [launch.kernel for launch in launches]


def test_launches_do_not_depend_on_adapters_ranks_or_runs() -> None:
    expected = [
        "_lora_segmented_down_kernel",
        "_lora_segmented_up_kernel",
        "_lora_segmented_down_kernel",  # d
        "_lora_segmented_weight_grad_kernel",  # dB
        "_lora_segmented_weight_grad_kernel",  # dA
        "_lora_segmented_weight_grad_kernel",  # of the biases
        "_lora_segmented_sum_kernel",
        "_lora_segmented_up_kernel",  # dx
    ]
    assert step((16,), [0]) == expected
    assert step((16, 16), [0, -1, 1, 0]) == expected
    assert step((4, 64, 16, 3, 8, 1, 32, 5, 16), [8, 0, 7, -1, 5, 6, 2, 1, 4, 3]) == expected
    assert step((8,) * 20, list(range(20))) == expected
    assert step((8, 16), [i % 2 for i in range(80)]) == expected  # by order, not gathered


def test_what_does_not_fit_is_taken_segment_by_segment() -> None:
    names = step((16, 16), [0, -1, 1, 0], (FP32, BF16))
    assert names.count("_lora_down_kernel") == 3
    assert not any("segmented" in name for name in names)


PAIRS = ((80, "fp32"), (90, "bf16"), (90, "fp32"), (120, "bf16"))
COMMON = [(capability, "bf16", a, 16) for capability, a in PAIRS]
ALL = [
    (capability, x, a, rank)
    for capability in sorted(GPU_LIMITS)
    for x, a in (
        *(("bf16", "bf16"), ("bf16", "fp32")),
        *(("fp16", "fp16"), ("fp16", "fp32"), ("fp32", "fp32")),
    )
    for rank in (16, 32, 64, 256)
    if capability >= 80 or x != "bf16"
]


@pytest.mark.parametrize(
    ("capability", "x_name", "a_name", "rank"),
    [
        pytest.param(*c, id="-".join(map(str, c)), marks=() if c in COMMON else pytest.mark.slow)
        for c in ALL
    ],
)
def test_launches(capability: int, x_name: str, a_name: str, rank: int) -> None:
    """Eight adapters of at most this rank, at the sizes of Llama-3-8B."""
    tokens, hidden, wide, count = 8192, 4096, 14336, 8
    x_dtype, a_dtype = NAMED[x_name], NAMED[a_name]
    ranks = [rank if j % 2 else 8 for j in range(count)]
    branches = tables.Branches(
        [torch.empty(r, hidden, dtype=a_dtype) for r in ranks],
        [torch.empty(wide, r, dtype=a_dtype) for r in ranks],
        *([2.0] * count, [None] * count, [1.0] * count),
        *([THRESHOLD] * count, range(count), [None] * count),
    )
    segments = [i * tokens // count for i in range(count + 1)]
    runs = [n for j in range(count) for n in (segments[j], segments[j + 1], j)]
    x, dx = (torch.empty(tokens, hidden, dtype=x_dtype) for _ in range(2))
    y, dy = (torch.empty(tokens, wide, dtype=x_dtype) for _ in range(2))
    seed = torch.tensor(1)
    with dry_run(capability) as launches:
        batch = tables.batch_of(runs, None, branches)
        assert batch is not None
        t = kernels.down(batch, x, tables.A, seed)
        kernels.up(batch, t, y, tables.B, add=False)
        kernels.up(batch, t, y, tables.B, add=True)
        kernels.down(batch, dy, tables.B)
        kernels.weight_grads(batch, dy, t, range(count), tables.B)
        kernels.up(batch, t, dx, tables.A, add=True, seed=seed)
        kernels.weight_grads(batch, x, t, range(count), tables.A, seed)
    products = [launch for launch in launches if launch.kernel not in SUMS]
    assert [launch.kernel[len("_lora_segmented_") : -len("_kernel")] for launch in products] == [
        *("down", "up", "up", "down", "weight_grad", "up", "weight_grad")
    ]
    for launch in launches:
        assert not launch.resources.spills, launch
        assert launch.shared_bytes <= launch.limits.shared_bytes_per_block
        assert launch.resident_programs >= 1
        assert_moves_16_bytes(launch, capability, (x_name, a_name))


def assert_moves_16_bytes(launch: Launch, capability: int, dtypes: tuple[str, str]) -> None:
    instructions, constants = launch.instructions, launch.constants
    wide = count_global_loads(instructions, bits=128)
    assert wide > 0, launch
    if launch.kernel in SUMS:
        return
    # Read by narrow loads: rows' numbers, and the scalars of tile, branch and dropout.
    rows = constants["BLOCK_M"] // (32 * launch.num_warps) + 1
    narrow = count_global_loads(instructions) - wide
    assert capability < 80 or narrow <= 16 + 2 * max(rows, 8), instructions
    if launch.kernel == "_lora_segmented_up_kernel":
        assert count_global_stores(instructions) == count_global_stores(instructions, bits=128)
        return
    if capability >= 80 and set(dtypes) != {"fp32"}:
        assert count_tensor_core(instructions) > 0
        assert any(name.startswith("LDGSTS") for name in instructions)

"""The CUDA kernels of a LoRA branch, on the emulator, against fp64 by the project's rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttune._native import lora_cuda
from fasttune.ops import LoraBranch, LoraProjection, _dropout, lora_linear, lora_linear_group
from fasttune.testing import cuda_on_host, numerics
from fasttune.testing.conformance import backend

ROOT = Path(__file__).parents[2]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CODES = {BF16: 1, F16: 2}
STEP = 64  # of a split of K

missing = cuda_on_host.compiler_missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.fixture(scope="session")
def kernels() -> cuda_on_host.Kernels:
    sources = [ROOT / "tests/cuda/lora_entry.cu", *sorted(ROOT.glob("csrc/cuda/lora*.cu"))]
    return cuda_on_host.Kernels(cuda_on_host.build(sources, ROOT / "csrc"))


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator).to(dtype)


@dataclass
class Group:
    """Projections of one input x [M, K], whose rows may lie apart."""

    x: Tensor
    a: list[Tensor]  # [R, K]
    scales: list[float]
    scale_tensors: list[Tensor | None]
    seeds: list[Tensor | None]
    thresholds: list[int]
    row_offset: int = 0
    transposed: bool = False  # A lies as [K, R]

    def truth(self, dtype: torch.dtype) -> list[Tensor]:
        """t of every branch, in a dtype."""
        ts, (rows, cols) = [], self.x.shape
        for j, a in enumerate(self.a):
            keep = _dropout.keep_mask(
                self.seeds[j], self.thresholds[j], rows, cols, branch=7 * j,
                row_offset=self.row_offset,
            )  # fmt: skip
            own = self.scale_tensors[j]
            scale = self.scales[j] * (1.0 if own is None else float(own))
            factor = a if self.transposed else a.t()
            ts.append((self.x.to(dtype) * keep) @ factor.to(dtype) * scale)
        return ts

    def cuda(
        self, kernels: cuda_on_host.Kernels, cols_per_split: int = 1 << 20, seed: int = 0
    ) -> list[Tensor]:
        rows, cols = self.x.shape
        ranks = [a.shape[1 if self.transposed else 0] for a in self.a]
        sizes = [rows * rank for rank in ranks]
        splits = -(-cols // cols_per_split)
        t = torch.full((sum(sizes),), torch.nan)
        partial = torch.full((splits, sum(sizes)), torch.nan) if splits > 1 else None
        given = list(zip(self.a, self.scale_tensors, self.seeds, strict=True))
        addresses = [[0 if p is None else p.data_ptr() for p in branch] for branch in given]
        numbers = [[rank, self.thresholds[j], 7 * j] for j, rank in enumerate(ranks)]
        kernels(
            "lora_down", self.x, t, partial, rows, cols, self.x.stride(0), cols_per_split, splits,
            self.row_offset, CODES[self.x.dtype], len(self.a), self.transposed,
            torch.tensor(addresses), torch.tensor(numbers), torch.tensor(self.scales), seed=seed,
            reachable=[p for branch in given for p in branch if p is not None],
        )  # fmt: skip
        parts = t.split(sizes)
        return [part.view(rows, -1) for part in parts]


def group(
    rows: int, cols: int, ranks: Sequence[int], dtype: torch.dtype, p: float = 0.0, gap: int = 0
) -> Group:
    count = len(ranks)
    x = normal(rows, cols + gap, dtype=dtype)[:, :cols]
    a = [normal(rank, cols, dtype=dtype, seed=j) for j, rank in enumerate(ranks)]
    seeds = [torch.tensor((1 << 40) + 3 * j) if p else None for j in range(count)]
    thresholds = [_dropout.threshold(p)] * count
    tensors = [torch.tensor(1.5) if j == 1 else None for j in range(count)]
    return Group(x, a, [0.5 + j for j in range(count)], tensors, seeds, thresholds)


def check(ours: Sequence[Tensor], own: Group) -> None:
    for j, (t, stock, truth) in enumerate(
        zip(ours, own.truth(F32), own.truth(torch.float64), strict=True)
    ):
        numerics.check(f"t {j}", t, stock, truth)


# Rows: less than a warp's, more than a block's. Columns: whole steps, a tail of one run of eight.
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize(
    ("rows", "cols", "ranks"),
    [
        (5, 64, [8]),
        (70, 136, [16]),
        (3, 40, [32]),
        (17, 72, [60]),
        (66, 200, [8, 16]),
        (9, 64, [32, 20]),
        (70, 72, [16, 8, 16]),
    ],
    ids=str,
)
def test_down_matches_the_reference(
    kernels: cuda_on_host.Kernels,
    rows: int,
    cols: int,
    ranks: list[int],
    dtype: torch.dtype,
    p: float,
) -> None:
    own = group(rows, cols, ranks, dtype, p)
    check(own.cuda(kernels, seed=rows + cols), own)


def test_down_of_odd_ranks_and_of_rows_that_lie_apart(kernels: cuda_on_host.Kernels) -> None:
    own = group(20, 72, [5, 3, 8], BF16, 0.3, gap=16)
    own.row_offset = (1 << 32) - 7  # the rows cross the low word of the counter
    check(own.cuda(kernels, seed=1), own)


@pytest.mark.parametrize("ranks", [[16, 8], [5]], ids=str)
def test_down_in_splits(kernels: cuda_on_host.Kernels, ranks: list[int]) -> None:
    own = group(30, 328, ranks, BF16, 0.1)
    check(own.cuda(kernels, 2 * STEP, seed=3), own)


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("rank", [8, 24, 64])
def test_down_by_a_transposed_factor(
    kernels: cuda_on_host.Kernels, rank: int, dtype: torch.dtype, steps: int
) -> None:
    """d = scale dy B of the backward, without a transposed copy of B."""
    own = group(21, 136, [rank], dtype)
    own.transposed, own.a = True, [normal(136, rank, dtype=dtype)]
    check(own.cuda(kernels, steps * STEP, seed=rank), own)


def test_dropped_elements_do_not_count_even_if_not_finite(kernels: cuda_on_host.Kernels) -> None:
    own = group(16, 64, [8], F16, 0.5)
    keep = _dropout.keep_mask(own.seeds[0], own.thresholds[0], 16, 64, branch=0).bool()
    own.x[~keep] = torch.inf
    (t,) = own.cuda(kernels)
    own.x[~keep] = 0
    check([t], own)


def test_the_branches_of_a_group_do_not_touch_each_other(kernels: cuda_on_host.Kernels) -> None:
    own = group(16, 64, [8, 8, 8], BF16, 0.3)
    together = own.cuda(kernels)
    own.a[1][:] = torch.nan
    poisoned = own.cuda(kernels)
    assert torch.equal(together[0], poisoned[0]) and torch.equal(together[2], poisoned[2])
    assert poisoned[1].isnan().all()


def test_the_schedule_changes_no_bit(kernels: cuda_on_host.Kernels) -> None:
    own = group(40, 200, [16, 8], BF16, 0.2)
    first = own.cuda(kernels, STEP)
    t, b = normal(20, 48, dtype=F32), normal(72, 48, dtype=BF16)
    y = up(kernels, t, b, None)
    for seed in range(1, 5):
        assert all(map(torch.equal, first, own.cuda(kernels, STEP, seed=seed)))
        assert torch.equal(y, up(kernels, t, b, None, seed=seed))


def input_gradient(
    kernels: cuda_on_host.Kernels, own: Group, ds: Sequence[Tensor], seed: int = 0
) -> Tensor:
    rows, cols = own.x.shape
    dx = torch.full((rows, cols + 8), torch.nan, dtype=own.x.dtype)
    given = list(zip(ds, own.a, own.seeds, strict=True))
    addresses = [[0 if p is None else p.data_ptr() for p in branch] for branch in given]
    numbers = [[a.shape[0], own.thresholds[j], 7 * j] for j, a in enumerate(own.a)]
    kernels(
        "lora_input_gradient", dx, rows, cols, cols + 8, own.row_offset, CODES[dx.dtype], len(ds),
        torch.tensor(addresses), torch.tensor(numbers), seed=seed,
        reachable=[p for branch in given for p in branch if p is not None],
    )  # fmt: skip
    assert dx[:, cols:].isnan().all()
    return dx[:, :cols]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize(
    ("rows", "cols", "ranks"),
    [(5, 40, [8]), (70, 72, [16, 4]), (9, 136, [40]), (17, 64, [16, 8, 16])],
    ids=str,
)
def test_input_gradient_matches_the_reference(
    kernels: cuda_on_host.Kernels,
    rows: int,
    cols: int,
    ranks: list[int],
    dtype: torch.dtype,
    p: float,
) -> None:
    own = group(rows, cols, ranks, dtype, p)
    own.row_offset = (1 << 32) - 3
    ds = [normal(rows, rank, dtype=F32, seed=j) for j, rank in enumerate(ranks)]
    stock, truth = (
        sum(
            _dropout.keep_mask(
                own.seeds[j], own.thresholds[j], rows, cols, branch=7 * j, row_offset=own.row_offset
            )
            * (d.to(wide) @ own.a[j].to(wide))
            for j, d in enumerate(ds)
        )
        for wide in (F32, torch.float64)
    )
    assert isinstance(stock, Tensor) and isinstance(truth, Tensor)
    ours = input_gradient(kernels, own, ds, seed=rows)
    numerics.check("dx", ours, stock.to(dtype), truth)
    assert torch.equal(ours, input_gradient(kernels, own, ds, seed=rows + 1))


def weight_gradient(
    kernels: cuda_on_host.Kernels,
    own: Group,
    ds: Sequence[Tensor],
    rows_per_split: int = 1 << 20,
    transposed: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    rows, cols = own.x.shape
    ranks = [d.shape[1] for d in ds]
    sizes, splits = [rank * cols for rank in ranks], -(-rows // rows_per_split)
    out = torch.full((sum(sizes),), torch.nan)
    partial = torch.full((splits, sum(sizes)), torch.nan) if splits > 1 else None
    addresses = [
        [d.data_ptr(), 0, 0 if s is None else s.data_ptr()]
        for d, s in zip(ds, own.seeds, strict=True)
    ]
    numbers = [[rank, own.thresholds[j], 7 * j] for j, rank in enumerate(ranks)]
    kernels(
        "lora_weight_gradient", own.x, out, partial, rows, cols, own.x.stride(0), rows_per_split,
        splits, own.row_offset, CODES[own.x.dtype], len(ds), transposed, torch.tensor(addresses),
        torch.tensor(numbers), seed=seed,
        reachable=[*ds, *(s for s in own.seeds if s is not None)],
    )  # fmt: skip
    shapes = [(cols, rank) if transposed else (rank, cols) for rank in ranks]
    return [part.view(shape) for part, shape in zip(out.split(sizes), shapes, strict=True)]


def check_weight_gradient(ours: Sequence[Tensor], own: Group, ds: Sequence[Tensor]) -> None:
    rows, cols = own.x.shape
    for j, d in enumerate(ds):
        keep = _dropout.keep_mask(
            own.seeds[j], own.thresholds[j], rows, cols, branch=7 * j, row_offset=own.row_offset
        )
        stock, truth = (d.to(wide).t() @ (own.x.to(wide) * keep) for wide in (F32, torch.float64))
        numerics.check(f"dA {j}", ours[j], stock, truth)


@pytest.mark.parametrize("rows_per_split", [32, 1 << 20])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize(
    ("rows", "cols", "ranks"),
    [(5, 40, [8]), (70, 72, [16, 4]), (40, 136, [40]), (17, 64, [16, 8, 16]), (33, 64, [20])],
    ids=str,
)
def test_weight_gradient_matches_the_reference(
    kernels: cuda_on_host.Kernels,
    rows: int,
    cols: int,
    ranks: list[int],
    dtype: torch.dtype,
    p: float,
    rows_per_split: int,
) -> None:
    own = group(rows, cols, ranks, dtype, p, gap=8)
    own.row_offset = (1 << 32) - 3
    ds = [normal(rows, rank, dtype=F32, seed=j) for j, rank in enumerate(ranks)]
    ours = weight_gradient(kernels, own, ds, rows_per_split, seed=rows)
    check_weight_gradient(ours, own, ds)
    again = weight_gradient(kernels, own, ds, rows_per_split, seed=rows + 1)
    assert all(map(torch.equal, ours, again))


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_weight_gradient_as_columns(kernels: cuda_on_host.Kernels, dtype: torch.dtype) -> None:
    """dB = dy^T t."""
    own = group(40, 72, [24], dtype)
    t = normal(40, 24, dtype=F32)
    (db,) = weight_gradient(kernels, own, [t], 32, transposed=True)
    check_weight_gradient([db.t()], own, [t])


def up(
    kernels: cuda_on_host.Kernels, t: Tensor, b: Tensor, bias: Tensor | None, seed: int = 0
) -> Tensor:
    rows, cols = t.shape[0], b.shape[0]
    y = torch.full((rows, cols + 8), torch.nan, dtype=b.dtype)
    kernels("lora_up", t, b, bias, y, rows, cols, t.shape[1], cols + 8, CODES[b.dtype], seed=seed)
    assert y[:, cols:].isnan().all()
    return y[:, :cols]


def product(t: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = t.to(dtype) @ b.to(dtype).t()
    return y if bias is None else y + bias.to(dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize(
    ("rows", "cols", "rank"), [(5, 40, 8), (70, 136, 16), (3, 8, 64), (17, 128, 40)], ids=str
)
def test_up_matches_the_reference(
    kernels: cuda_on_host.Kernels,
    rows: int,
    cols: int,
    rank: int,
    dtype: torch.dtype,
    with_bias: bool,
) -> None:
    t, b = normal(rows, rank, dtype=F32), normal(cols, rank, dtype=dtype)
    bias = normal(cols, dtype=F32) if with_bias else None
    y = up(kernels, t, b, bias, seed=rows)
    numerics.check("y", y, product(t, b, bias, F32).to(dtype), product(t, b, bias, torch.float64))


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_up_rounds_no_operand(kernels: cuda_on_host.Kernels, dtype: torch.dtype) -> None:
    """Terms that cancel leave what a rounded t or b would lose."""
    t = torch.tensor([[1 + 2**-20, -1.0, *[0.0] * 6]])
    b = torch.zeros(8, 8, dtype=dtype)
    b[:, :2] = 1 + torch.finfo(dtype).eps
    y = up(kernels, t, b, None)
    exact = product(t, b, None, torch.float64)
    assert exact.abs().min() > 2**-21
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()


def grouped(name: str, ranks: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """The outputs of a group with dropout, then the gradients of x and of every A and B."""
    x = normal(2, 19, 48, dtype=dtype).requires_grad_()
    leaves, projections = [x], []
    for j, rank in enumerate(ranks):
        a = (normal(rank, 48, dtype=dtype, seed=j) / 7).requires_grad_()
        b = (normal(40, rank, dtype=dtype, seed=j) / 4).requires_grad_()
        weight = normal(40, 48, dtype=dtype, seed=j) / 7
        leaves += [a, b]
        branch = LoraBranch(a, b, 1.5, dropout_p=0.2)
        projections.append(LoraProjection(weight, None, (branch,)))
    with backend(name):
        ys = lora_linear_group(x, projections, seed=torch.tensor(-5))
        dys = [normal(*y.shape, dtype=dtype, seed=9 + j) for j, y in enumerate(ys)]
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys)]


# Three branches of 16 are one kernel, of 24 they are not.
@pytest.mark.parametrize("ranks", [(8, 16, 8), (24, 24, 24), (8, 32)], ids=str)
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_the_backend_takes_groups(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, ranks: tuple[int, ...]
) -> None:
    launched: list[tuple[str, int]] = []
    real = lora_cuda.launch

    def launch(name: str, *args: Any, **options: Any) -> None:
        launched.append((name, max((len(arg) for arg in args if isinstance(arg, list)), default=1)))
        real(name, *args, **options)

    monkeypatch.setattr(lora_cuda, "launch", launch)
    ours, reference = grouped("cuda", ranks, dtype), grouped("reference", ranks, dtype)
    for j, (mine, theirs) in enumerate(zip(ours, reference, strict=True)):
        # Both sum in fp32; the outputs and dx have a vendor product that rounds once more.
        allowed = 2 * torch.finfo(dtype).eps * float(theirs.double().abs().max())
        assert numerics.largest_error(mine, theirs) <= allowed, j
    widest = len(ranks) if ranks != (24, 24, 24) else 1
    for name in ("lora_down", "lora_input_gradient", "lora_weight_gradient"):
        assert max(size for own, size in launched if own == name) == widest, name


def test_the_terms_of_a_factor_add_up_to_it() -> None:
    numbers = normal(1000, dtype=F32)
    factor = torch.cat([numbers, numbers * 1e-20, torch.tensor([0.0, 1 / 3, 3.4e38])])
    terms = lora_cuda._terms(factor)
    assert [term.dtype for term in terms] == [BF16] * 3
    total = torch.stack([term.double() for term in terms]).sum(0)
    assert torch.equal(total, factor.double())
    odd = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    total = torch.stack([term.float() for term in lora_cuda._terms(odd)]).sum(0)
    plain = total.nan_to_num(nan=7.0, posinf=8.0, neginf=9.0)
    assert torch.equal(plain, torch.tensor([8.0, 9.0, 7.0, 0.0]))


@pytest.mark.parametrize("wide", ["a", "b"])
def test_one_factor_may_be_in_fp32(wide: str) -> None:
    """No operand is rounded: what bf16 would lose of the factor is in the result."""
    x, weight = normal(70, 64, dtype=BF16), torch.zeros(48, 64, dtype=BF16)
    dtypes = {"a": BF16, "b": BF16, wide: F32}
    a = (normal(16, 64, dtype=dtypes["a"]) / 8).requires_grad_()
    b = (normal(48, 16, dtype=dtypes["b"], seed=1) / 4).requires_grad_()
    grads = []
    for name in ("cuda", "reference"):
        with backend(name):
            y = lora_linear(x, weight, a, b, scaling=1.5)
            grads.append(torch.autograd.grad(y, (a, b), normal(70, 48, dtype=BF16, seed=2)))
    for ours, theirs, factor in zip(*grads, (a, b), strict=True):
        assert ours.dtype == factor.dtype
        # Sums of up to 70 products in another order; rounded to bf16, a factor would lose 2^-9.
        allowed = 8 * torch.finfo(factor.dtype).eps * float(theirs.double().abs().max())
        assert numerics.largest_error(ours, theirs) <= allowed


def test_memory_outside_the_tensors_is_an_error(kernels: cuda_on_host.Kernels) -> None:
    """The suite can fail: a row too many is found."""
    t, b = normal(4, 8, dtype=F32), normal(8, 8, dtype=BF16)
    y = torch.zeros(4, 8, dtype=BF16)
    with pytest.raises(cuda_on_host.EmulatorError, match="out-of-bounds"):
        kernels("lora_up", t, b, None, y, 5, 8, 8, 8, CODES[BF16])

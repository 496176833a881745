"""The CUDA kernels of AdamW, on the emulator, against the reference of the op."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttune.ops import _adamw_reference as reference
from fasttune.testing import cuda_on_host
from fasttune_kernels.adamw_tables import (
    ADDRESSES,
    BLOCK,
    MOMENTS,
    QUANTISED,
    ROUNDINGS,
    StepArguments,
)
from fasttune_kernels.multi_tensor_tables import limit_table

ROOT = Path(__file__).parents[2]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
F32, BF16, F16 = CODES
MOMENT_DTYPES = dict(zip(MOMENTS, (F32, BF16, torch.uint8), strict=True))
SHAPES = [(9000,), (37,), (3, 100)]  # two blocks and a tail, a tail alone, whole vectors and a tail

missing = cuda_on_host.compiler_missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.fixture(scope="session")
def kernels() -> cuda_on_host.Kernels:
    sources = [ROOT / "tests/cuda/adamw_entry.cu", *sorted(ROOT.glob("csrc/cuda/adamw*.cu"))]
    return cuda_on_host.Kernels(cuda_on_host.build(sources, ROOT / "csrc"))


def blocks_of(tensors: list[Tensor]) -> Tensor:
    counts = [-(-t.numel() // BLOCK) for t in tensors]
    rows = [[i, j, count] for i, count in enumerate(counts) for j in range(count)]
    return torch.tensor(rows, dtype=torch.int32)


class Step:
    """Tensors of one step, and copies for the reference."""

    def __init__(self, dtype: torch.dtype, moments: str, rounding: str, amsgrad: bool) -> None:
        generator = torch.Generator().manual_seed(1)

        def random(scale: float, kind: torch.dtype) -> list[Tensor]:
            return [(torch.randn(s, generator=generator) * scale).to(kind) for s in SHAPES]

        self.rounding, self.moments = rounding, moments
        self.params, self.grads = random(1.0, dtype), random(0.1, dtype)
        kind = MOMENT_DTYPES[moments]
        zeros = lambda own: [torch.zeros(s, dtype=own) for s in SHAPES]  # noqa: E731
        self.m, self.v = zeros(kind), zeros(kind)
        self.top = zeros(kind) if amsgrad else []
        residue = {"master": torch.int16, "kahan": dtype}.get(rounding)
        self.residues = [] if residue is None else zeros(residue)
        blocks = [-(-p.numel() // QUANTISED) for p in self.params]
        self.scales = [torch.zeros(2, b) for b in blocks] if moments == "8bit" else []

    @property
    def lists(self) -> list[list[Tensor]]:
        return [self.params, self.grads, self.m, self.v, self.top, self.residues, self.scales]

    def facts(self, time: int) -> Tensor:
        rows = [[1e-2, 0.9, 0.99, 1e-8, 0.1, time, i] for i in range(len(SHAPES))]
        return torch.tensor(rows, dtype=torch.float64)

    def squares(self, kernels: cuda_on_host.Kernels, seed: int = 0) -> Tensor:
        blocks, out = blocks_of(self.grads), torch.full((), math.nan, dtype=torch.float64)
        partial, counter = torch.full((len(blocks),), math.nan), torch.zeros(1, dtype=torch.int32)
        table = self.table()
        kernels(
            "grad_norm", table, blocks, len(blocks), partial, counter, out,
            CODES[self.grads[0].dtype], seed=seed, reachable=self.grads,
        )  # fmt: skip
        assert counter.item() == 0
        return out

    def table(self) -> Tensor:
        table = torch.zeros(len(SHAPES), len(ADDRESSES), dtype=torch.int64)
        for column, tensors in enumerate(self.lists):
            if tensors:
                table[:, column] = torch.tensor([t.data_ptr() for t in tensors])
        table[:, ADDRESSES.index("numel")] = torch.tensor([p.numel() for p in self.params])
        return table

    def cuda(
        self, kernels: cuda_on_host.Kernels, time: int, seed: int = 0, **options: Any
    ) -> Tensor:
        blocks, norms = blocks_of(self.params), torch.full((len(SHAPES), 3), math.nan)
        partial = torch.full((len(blocks), 3), math.nan)
        counters = torch.zeros(len(SHAPES), dtype=torch.int32)
        kernels(
            "adamw", self.table(), self.facts(time), blocks, len(blocks), partial, counters, norms,
            options.get("squares"), options.get("grad_scale"), options.get("found_inf"),
            float(options.get("max_grad_norm", 1.0)), 1.0, int(options.get("skip", False)), 5,
            CODES[self.params[0].dtype], CODES[self.grads[0].dtype], MOMENTS.index(self.moments),
            ROUNDINGS.index(self.rounding), seed=seed,
            reachable=[t for tensors in self.lists for t in tensors],
        )  # fmt: skip
        assert not counters.any()
        return norms

    def expected(self, time: int, **options: Any) -> Tensor:
        arguments = StepArguments(
            *self.lists, self.facts(time), rounding=self.rounding, seed=5, **options
        )
        return reference.step(arguments)


FORMATS = [
    (F32, "fp32", "nearest", False),
    (F32, "fp32", "nearest", True),
    (F32, "8bit", "nearest", False),
    (BF16, "fp32", "master", False),
    (BF16, "bf16", "stochastic", True),
    (BF16, "8bit", "kahan", False),
    (F16, "bf16", "kahan", False),
    (F16, "fp32", "nearest", False),
]


@pytest.mark.parametrize(("dtype", "moments", "rounding", "amsgrad"), FORMATS, ids=str)
def test_a_step_is_that_of_the_reference(
    kernels: cuda_on_host.Kernels,
    dtype: torch.dtype,
    moments: str,
    rounding: str,
    amsgrad: bool,
) -> None:
    ours, theirs = (Step(dtype, moments, rounding, amsgrad) for _ in range(2))
    for time in (1, 2):
        squares = ours.squares(kernels, seed=time)
        norms = ours.cuda(kernels, time, seed=time, squares=squares, max_grad_norm=1.0)
        expected = theirs.expected(time, squares=squares, max_grad_norm=1.0)
    exact = sum(float(grad.double().square().sum()) for grad in ours.grads)
    assert float(squares) == pytest.approx(exact, rel=1e-6)
    # Both round at each step; a stochastic rounding turns on the last bit of its argument.
    update = 2e-2 * 2**-20 if moments == "fp32" else 1e-2 * 2**-3
    for p, q in zip(ours.params, theirs.params, strict=True):
        place = 2 * torch.finfo(dtype).eps * (q.double().abs() + 2e-2)
        assert ((p.double() - q.double()).abs() <= place + update).all()
    for mine, other in zip(
        [*ours.m, *ours.v, *ours.top], [*theirs.m, *theirs.v, *theirs.top], strict=True
    ):
        if other.dtype == F32:
            assert torch.allclose(mine, other, rtol=2**-18, atol=1e-9)
        else:
            assert (mine != other).float().mean() < 0.01
    for mine, other in zip(ours.residues, theirs.residues, strict=True):
        assert (mine.int() - other.int()).abs().float().mean() < (64 if rounding == "master" else 1)
    assert torch.allclose(norms, expected, rtol=1e-2 if moments != "fp32" else 2**-10, atol=1e-7)


def test_the_schedule_changes_no_bit(kernels: cuda_on_host.Kernels) -> None:
    results = []
    for seed in range(4):
        step = Step(BF16, "8bit", "master", False)
        squares = step.squares(kernels, seed=seed)
        norms = step.cuda(kernels, 1, seed=seed, squares=squares)
        results.append(
            [squares, norms, *step.params, *step.m, *step.v, *step.residues, *step.scales]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("why", ["found_inf", "skip"])
def test_a_skipped_step_changes_nothing(kernels: cuda_on_host.Kernels, why: str) -> None:
    step = Step(F32, "fp32", "nearest", False)
    before = [t.clone() for tensors in step.lists for t in tensors]
    options: dict[str, Any] = {"found_inf": torch.ones(())}
    if why == "skip":
        options = {"squares": torch.tensor(math.inf, dtype=torch.float64), "skip": True}
    norms = step.cuda(kernels, 1, **options)
    now = [t for tensors in step.lists for t in tensors]
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    assert norms.isnan().all()


def test_unscaling(kernels: cuda_on_host.Kernels) -> None:
    usual, scaled = (Step(F32, "fp32", "nearest", False) for _ in range(2))
    for grad in scaled.grads:
        grad *= 1024
    one = usual.cuda(kernels, 1)
    two = scaled.cuda(kernels, 1, grad_scale=torch.tensor(1024.0), found_inf=torch.zeros(()))
    assert torch.equal(one, two)
    assert all(torch.equal(p, q) for p, q in zip(usual.params, scaled.params, strict=True))


def test_memory_outside_the_tables_is_an_error(kernels: cuda_on_host.Kernels) -> None:
    """The suite can fail: a size that is too large is found."""
    step = Step(F32, "fp32", "nearest", False)
    table = step.table()
    table[1, ADDRESSES.index("numel")] += 1
    blocks = blocks_of(step.params)
    with pytest.raises(cuda_on_host.EmulatorError, match="out-of-bounds"):
        kernels(
            "grad_norm", table, blocks, len(blocks), torch.zeros(len(blocks)),
            torch.zeros(1, dtype=torch.int32), torch.zeros((), dtype=torch.float64), 0,
            reachable=step.grads,
        )  # fmt: skip


@pytest.mark.parametrize(("dtype", "moments", "rounding", "amsgrad"), FORMATS, ids=str)
def test_limits_are_those_of_the_reference(
    kernels: cuda_on_host.Kernels,
    dtype: torch.dtype,
    moments: str,
    rounding: str,
    amsgrad: bool,
) -> None:
    ours, theirs = (Step(dtype, moments, rounding, amsgrad) for _ in range(2))
    norms = [step.expected(1) for step in (ours, theirs)]
    limits = torch.tensor([3.0, math.inf, 1.0], dtype=torch.float64)
    table = limit_table(ours.params, ours.residues, [p.numel() for p in ours.params], limits)
    blocks = blocks_of(ours.params)
    kernels(
        "limit_norms", table, blocks, len(blocks), norms[0], CODES[dtype],
        ROUNDINGS.index(rounding), seed=3, reachable=[*ours.params, *ours.residues],
    )  # fmt: skip
    reference.limit_norms(theirs.params, theirs.residues, norms[1], limits, rounding)
    for mine, other in zip(
        [*ours.params, *ours.residues], [*theirs.params, *theirs.residues], strict=True
    ):
        assert torch.equal(mine, other)
    assert float(ours.params[0].double().norm()) == pytest.approx(3.0, rel=1e-2)

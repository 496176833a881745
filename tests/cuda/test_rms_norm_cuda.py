"""The CUDA kernels of rms_norm, on the emulator, against fp64 by the project's rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasttune.ops import _rms_norm_reference as reference
from fasttune.testing import cuda_on_host, numerics

ROOT = Path(__file__).parents[2]
EPS = 1e-5
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
F32, BF16, F16 = CODES

missing = cuda_on_host.compiler_missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.fixture(scope="session")
def kernels() -> cuda_on_host.Kernels:
    sources = [ROOT / "tests/cuda/rms_norm_entry.cu", ROOT / "csrc/cuda/rms_norm.cu"]
    return cuda_on_host.Kernels(cuda_on_host.build(sources, ROOT / "csrc"))


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


# 40 and 2056 columns take the 16-byte accesses (and 2056 more than one step), 37 does not.
SHAPES = [(3, 40), (2, 37), (2, 2056), (1, 1)]
# x, weight, weight_offset, round_first, y
KINDS = [
    (F32, F32, 0.0, False, F32),
    (BF16, BF16, 1.0, False, BF16),
    (BF16, F32, 0.0, True, F32),
    (BF16, None, 0.0, False, BF16),
    (F16, F16, 0.0, True, F16),
    (F16, F32, 1.0, False, F16),
]


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_matches_the_reference(
    kernels: cuda_on_host.Kernels,
    shape: tuple[int, int],
    kind: tuple[torch.dtype, torch.dtype | None, float, bool, torch.dtype],
    added: bool,
) -> None:
    x_type, weight_type, offset, round_first, y_type = kind
    rows, cols = shape
    x = normal(rows, cols, dtype=x_type)
    residual = normal(rows, cols + 1, dtype=x_type)[:, 1:].contiguous() if added else None
    weight = None if weight_type is None else normal(cols, dtype=weight_type)
    y, rstd = unwritten(rows, cols, dtype=y_type), unwritten(rows)
    total = unwritten(rows, cols, dtype=x_type) if added else None
    kernels(
        "rms_norm_fwd",
        *(x, residual, weight, y, total, rstd, rows, cols, cols),
        *(CODES[x_type], CODES[weight_type or x_type], CODES[y_type], EPS, offset, round_first),
        seed=rows + cols,
    )
    if residual is not None and total is not None:
        expected = reference.add_forward(x, residual, weight, EPS, offset, round_first, y_type)
        assert torch.equal(total, expected[1])
        x = total
    stock = reference.forward(x, weight, EPS, offset, round_first, y_type)
    # round_first rounds to x's dtype on the way, which is part of the function and not an error.
    if round_first:
        allowed = 2 * torch.finfo(x_type).eps * float(stock[0].abs().max())
        assert numerics.largest_error(y, stock[0]) <= allowed
    else:
        wide = None if weight is None else weight.double()
        truth = reference.forward(x.double(), wide, EPS, offset, False, torch.float64)
        numerics.check("y", y, stock[0], truth[0])
        numerics.check("rstd", rstd, stock[1], truth[1])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("added", [False, True])
def test_backward_matches_the_reference(
    kernels: cuda_on_host.Kernels,
    shape: tuple[int, int],
    kind: tuple[torch.dtype, torch.dtype | None, float, bool, torch.dtype],
    added: bool,
) -> None:
    x_type, weight_type, offset, _, dy_type = kind
    rows, cols = shape
    x, dy = normal(rows, cols, dtype=x_type), normal(cols, rows, dtype=dy_type).T.contiguous()
    addend = normal(rows, cols + 1, dtype=x_type)[:, 1:].contiguous() if added else None
    weight = None if weight_type is None else normal(cols, dtype=weight_type)
    wide_weight, wide_addend = (None if t is None else t.double() for t in (weight, addend))
    rstd = torch.rsqrt(x.double().pow(2).mean(-1) + EPS)
    dx, blocks = unwritten(rows, cols, dtype=x_type), 2
    partial = None if weight is None else unwritten(blocks, cols)
    dweight = None if weight is None else unwritten(cols)
    kernels(
        "rms_norm_bwd",
        *(dy, x, weight, rstd.float(), addend, dx, partial, dweight, rows, cols, cols, blocks),
        *(CODES[dy_type], CODES[x_type], CODES[weight_type or x_type], offset),
        seed=rows + cols,
    )
    need = weight is not None
    stock = reference.backward(dy, x, weight, rstd.float(), addend, offset, True, need)
    truth = reference.backward(
        dy.double(), x.double(), wide_weight, rstd, wide_addend, offset, True, need
    )
    numerics.check("dx", dx, stock[0], truth[0])
    if dweight is not None:
        numerics.check("dweight", dweight, stock[1], truth[1])


def test_dweight_alone_and_its_bits_do_not_depend_on_the_schedule(
    kernels: cuda_on_host.Kernels,
) -> None:
    x, dy, weight = (normal(5, 48, dtype=F32) for _ in range(3))
    rstd, results = torch.ones(5), []
    for seed in range(6):
        dweight = unwritten(48)
        kernels(
            "rms_norm_bwd",
            *(dy, x, weight[0], rstd, None, None, unwritten(3, 48), dweight, 5, 48, 48, 3),
            *(0, 0, 0, 0.0),
            seed=seed,
        )
        results.append(dweight)
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0], (dy * x).sum(0))


def test_rows_with_a_stride_that_forbids_wide_accesses(kernels: cuda_on_host.Kernels) -> None:
    whole = normal(4, 43, dtype=BF16)
    x, y, rstd = whole[:, 1:41], unwritten(4, 40, dtype=BF16), unwritten(4)
    kernels("rms_norm_fwd", x, None, None, y, None, rstd, 4, 40, 43, 1, 1, 1, EPS, 0.0, 0, seed=1)
    stock = reference.forward(x, None, EPS, 0.0, False, BF16)
    truth = reference.forward(x.double(), None, EPS, 0.0, False, torch.float64)
    numerics.check("y", y, stock[0], truth[0])

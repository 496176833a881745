"""The CUDA kernels of glu, on the emulator, against fp64 by the project's rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasttune.ops._activations import ACTIVATIONS
from fasttune.testing import cuda_on_host, numerics

ROOT = Path(__file__).parents[2]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

missing = cuda_on_host.compiler_missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.fixture(scope="session")
def kernels() -> cuda_on_host.Kernels:
    sources = [ROOT / "tests/cuda/glu_entry.cu", ROOT / "csrc/cuda/glu.cu"]
    return cuda_on_host.Kernels(cuda_on_host.build(sources, ROOT / "csrc"))


def halves(rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * cols)
    packed = (3 * torch.randn(rows, 2 * cols, generator=generator)).to(dtype)
    return packed[:, :cols], packed[:, cols:]


def forward(name: str, gate: Tensor, up: Tensor) -> Tensor:
    return ACTIVATIONS[name].value(gate) * up


def backward(name: str, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return dy * up * ACTIVATIONS[name].slope(gate), dy * ACTIVATIONS[name].value(gate)


# 40 columns take the 16-byte accesses, 37 do not; 5 x 136 is more than one block.
@pytest.mark.parametrize("shape", [(3, 40), (2, 37), (5, 136), (0, 8)], ids=str)
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_forward_and_backward_match_the_reference(
    kernels: cuda_on_host.Kernels, name: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    rows, cols = shape
    gate, up = halves(rows, cols, dtype)
    dy = torch.linspace(-2, 2, rows * cols).view(rows, cols).to(dtype)
    y, dgate, dup = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(3))
    facts = (rows, cols, 2 * cols, CODES[dtype], list(ACTIVATIONS).index(name))
    kernels("glu_fwd", gate, up, y, *facts, seed=cols)
    kernels("glu_bwd", dy, gate, up, dgate, dup, *facts, seed=cols)
    narrow, wide = (dy.float(), gate.float(), up.float()), (dy.double(), gate.double(), up.double())
    stock = (forward(name, *narrow[1:]), *backward(name, *narrow))
    truth = (forward(name, *wide[1:]), *backward(name, *wide))
    for label, value, s, t in zip(
        ("y", "dgate", "dup"), (y, dgate, dup), stock, truth, strict=True
    ):
        numerics.check(label, value, s.to(dtype), t)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_extremes_stay_finite_and_a_nan_stays_one(kernels: cuda_on_host.Kernels, name: str) -> None:
    gate = torch.tensor([[-1e4, -200.0, -0.0, 0.0, 200.0, 1e4, torch.nan, 1.0]])
    one = torch.ones_like(gate)
    y, dgate, dup = (torch.full_like(gate, -7.0) for _ in range(3))
    code = list(ACTIVATIONS).index(name)
    kernels("glu_fwd", gate, one, y, 1, 8, 8, 0, code)
    kernels("glu_bwd", one, gate, one, dgate, dup, 1, 8, 8, 0, code)
    assert [result.isnan().tolist()[0].index(True) for result in (y, dup)] == [6, 6]
    assert dgate[0, :6].isfinite().all() and y[0, :6].isfinite().all()
    numerics.check(
        "y",
        y[:, :6],
        ACTIVATIONS[name].value(gate)[:, :6],
        ACTIVATIONS[name].value(gate.double())[:, :6],
    )


def test_a_gradient_that_is_not_wanted_is_not_written(kernels: cuda_on_host.Kernels) -> None:
    gate, up = halves(2, 16, torch.float32)
    dy, dup = torch.ones(2, 16), torch.full((2, 16), torch.nan)
    kernels("glu_bwd", dy, gate, up, None, dup, 2, 16, 32, 0, 0)
    torch.testing.assert_close(dup, ACTIVATIONS["silu"].value(gate))

"""The CUDA emulator: right kernels pass in every order of threads, planted faults are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasttune.testing import cuda_on_host

ROOT = Path(__file__).parents[2]
BLOCKS, THREADS = 3, 64
SEEDS = range(8)

missing = cuda_on_host.compiler_missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.fixture(scope="session")
def kernels() -> cuda_on_host.Kernels:
    source = ROOT / "tests/cuda/faults.cu"
    return cuda_on_host.Kernels(cuda_on_host.build([source], ROOT / "csrc"))


def unwritten(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


def run(kernels: cuda_on_host.Kernels, name: str, fault: int, seed: int) -> tuple[Tensor, Tensor]:
    """y of a kernel and the truth."""
    x = torch.randn(BLOCKS, THREADS, generator=torch.Generator().manual_seed(seed))
    if name == "sum":
        y, truth = unwritten(BLOCKS), x.double().sum(1)
    elif name == "reverse":
        y, truth = unwritten(BLOCKS, THREADS), x.flip(1)
    elif name == "rotate":
        x = x[0, :32].clone()
        y, truth = unwritten(32), x.roll(-1)
    else:
        y, truth = unwritten(BLOCKS, THREADS), x
    kernels(f"launch_{name}", x, y, BLOCKS if name != "rotate" else 1, fault, seed=seed)
    return y, truth


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["sum", "reverse", "copy", "rotate"])
def test_right_kernels_pass_in_every_order(
    kernels: cuda_on_host.Kernels, name: str, seed: int
) -> None:
    y, truth = run(kernels, name, 0, seed)
    torch.testing.assert_close(y.double(), truth.double(), rtol=0, atol=1e-5)


FAULTS = [
    ("sum", 1, "race: (read after write|write after read)|has not written"),
    ("sum", 2, r"divergent __syncthreads: thread \d+ waits at .*faults.cu:\d+, this one at"),
    ("sum", 3, "out-of-bounds index 2 at .*faults.cu"),
    ("sum", 4, r"out-of-bounds read of 4 bytes, 768 bytes into a buffer of 768 at .*faults.cu:\d+"),
    ("copy", 5, "misaligned access at .*faults.cu"),
    (
        "reverse",
        6,
        r"race: (write after read|read after write) at dynamic .* with thread \d+ at .*\.cu",
    ),
    ("sum", 8, r"shuffle reads lane \d+, outside its mask, at .*faults.cu"),
    ("reverse", 9, "before its cp.async was waited for"),
    ("sum", 10, "divergent __syncthreads: a thread (has )?ended"),
    ("rotate", 11, "race: (read after write|write after read)|has not written"),
    ("sum", 12, r"deadlock: no thread can go on; thread \d+ at .*faults.cu:\d+"),
    ("sum", 13, "read of static shared memory .* has not written"),
    ("reverse", 14, "out-of-bounds write of 4 bytes.*faults.cu"),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "fault", "message"), FAULTS, ids=[f"{name}-{fault}" for name, fault, _ in FAULTS]
)
def test_planted_faults_are_named(
    kernels: cuda_on_host.Kernels, name: str, fault: int, message: str, seed: int
) -> None:
    with pytest.raises(cuda_on_host.EmulatorError, match=message) as caught:
        run(kernels, name, fault, seed)
    assert "block (" in str(caught.value)


def test_unwritten_output_stays_nan(kernels: cuda_on_host.Kernels) -> None:
    y, truth = run(kernels, "sum", 7, 0)
    assert y.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(y[::2].double(), truth[::2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics_count_every_element(kernels: cuda_on_host.Kernels, seed: int) -> None:
    x = torch.arange(BLOCKS * THREADS, dtype=torch.int32) ** 2 % 7
    counts = torch.zeros(4, dtype=torch.int32)
    kernels("launch_count", x, counts, BLOCKS, seed=seed)
    assert counts.tolist() == torch.bincount(x % 4, minlength=4).tolist()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_tensor_core_product_equals_the_matrix_product(
    kernels: cuda_on_host.Kernels, name: str, dtype: torch.dtype
) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    d = unwritten(16, 8)
    kernels(f"launch_multiply_{name}", a, b, d, seed=3)
    torch.testing.assert_close(d.double(), a.double() @ b.double().T, rtol=0, atol=1e-5)


def test_an_error_does_not_outlive_its_call(kernels: cuda_on_host.Kernels) -> None:
    with pytest.raises(cuda_on_host.EmulatorError):
        run(kernels, "sum", 4, 1)
    y, truth = run(kernels, "sum", 0, 1)
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=1e-5)


def test_two_libraries_keep_their_shared_memory_apart(kernels: cuda_on_host.Kernels) -> None:
    source = ROOT / "tests/cuda/faults.cu"
    other = cuda_on_host.Kernels(cuda_on_host.build([source], ROOT / "csrc", macros=["OTHER"]))
    x = torch.randn(BLOCKS, THREADS)
    for library in (kernels, other):
        y = unwritten(BLOCKS)
        library("launch_block_sum", x, y, BLOCKS, seed=1)
        torch.testing.assert_close(y.double(), x.double().sum(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, "a lane is not in its own mask at .*faults.cu"),
        (2, "the mask names a lane that has ended|deadlock"),
        (3, "divergent warp operation: lanes wait at .*faults.cu"),
        (4, "ended with a cp.async that it did not wait for"),
        (5, "signed overflow at .*faults.cu"),
    ],
)
def test_faults_of_a_warp_are_named(
    kernels: cuda_on_host.Kernels, fault: int, message: str, seed: int
) -> None:
    x, y = torch.randn(32), unwritten(32)
    kernels("launch_warp_sum", x, y, 0, seed=seed)
    torch.testing.assert_close(y, x.sum().expand(32), rtol=0, atol=1e-5)
    with pytest.raises(cuda_on_host.EmulatorError, match=message):
        kernels("launch_warp_sum", x, y, fault, seed=seed)

"""The interpreter helper itself, against torch: bfloat16 must behave as on a GPU."""

import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder
from triton.runtime.jit import JITFunction

import fasttune_kernels.lora_linear as lora_linear
from fasttune.testing.triton_dry_run import dry_run
from fasttune.testing.triton_interpreter import interpreted, round_to_bfloat16, widen_bfloat16

BF16 = torch.bfloat16
THIS = sys.modules[__name__]


@triton.jit
def _binary_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = x / y
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "less":
        out = (x < y).to(out_ptr.dtype.element_ty)
    elif OP == "where":
        out = tl.where(x < y, x, y)
    elif OP == "fma":
        out = tl.fma(x, y, x)
    elif OP == "neg":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "clamp":
        out = tl.clamp(x, -tl.abs(y), tl.abs(y))
    elif OP == "scalar":
        out = x * 0.5 + 1.0
    tl.store(out_ptr + i, out)


EXPECTED = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "less": lambda x, y: (x < y).to(x.dtype),
    "where": torch.minimum,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "clamp": lambda x, y: x.clamp(-y.abs(), y.abs()),
    "scalar": lambda x, y: x * 0.5 + 1.0,
}


def run_binary(x: Tensor, y: Tensor, op: str) -> Tensor:
    out = torch.full_like(x, float("nan"))
    with interpreted(THIS):
        _binary_kernel[(1,)](x, y, out, OP=op, N=x.numel())
    return out


@pytest.mark.parametrize("op", sorted(EXPECTED))
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_elementwise_operations_are_bit_equal_to_torch(op: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, generator=generator).to(dtype)
    y = torch.randn(512, generator=generator).to(dtype)
    # bf16 / bf16 is fp32 in Triton, rounded once by the store, as torch does.
    assert torch.equal(run_binary(x, y, op), EXPECTED[op](x, y))


def test_fma_rounds_once() -> None:
    # x * y + x is exact in fp64 for 8-bit significands of similar size; one rounding is the truth.
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4096, generator=generator).to(BF16)
    y = torch.randn(4096, generator=generator).to(BF16)
    exact = x.double() * y.double() + x.double()
    below = (exact.float().view(torch.int32) & -65536).view(torch.float32)
    out = run_binary(x, y, "fma").double()
    ulp = (below.double().abs() * 2.0**-7).clamp(min=1e-30)
    assert ((out - exact).abs() <= 0.5 * ulp).all()
    assert not torch.equal(run_binary(x, y, "fma"), x * y + x), "two roundings would differ"


def test_rounding_to_bfloat16_matches_torch_on_edges() -> None:
    bits = np.arange(2**32 - 2**20, 2**32, 7, dtype=np.uint64).astype(np.uint32)
    ties = np.arange(0, 2**32, 2**15, dtype=np.uint64).astype(np.uint32)
    values = np.concatenate([bits, ties, ties + 1, ties - 1]).view(np.float32)
    ours = widen_bfloat16(round_to_bfloat16(values))
    theirs = torch.from_numpy(values.copy()).to(BF16).float().numpy()
    np.testing.assert_array_equal(ours, theirs)  # NaN equals NaN here


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("target", [BF16, torch.float16, torch.float32, torch.int32])
@pytest.mark.parametrize("source", [BF16, torch.float16, torch.float32, torch.int32])
def test_casts_match_torch(source: torch.dtype, target: torch.dtype) -> None:
    x = (torch.randn(256, generator=torch.Generator().manual_seed(2)) * 100).to(source)
    out = torch.zeros(256, dtype=target)
    with interpreted(THIS):
        _cast_kernel[(1,)](x, out, N=256)
    assert torch.equal(out, x.to(target))


@triton.jit
def _reduce_kernel(x_ptr, sum_ptr, max_ptr, scan_ptr, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M)
    j = tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * N + j[None, :])
    tl.store(sum_ptr + i, tl.sum(x, 1))
    tl.store(max_ptr + i, tl.max(x, 1).to(max_ptr.dtype.element_ty))
    tl.store(scan_ptr + i[:, None] * N + j[None, :], tl.cumsum(x, 1))


def test_bfloat16_reductions_use_values_not_bit_patterns() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)).to(BF16)
    total, top = torch.empty(4, dtype=BF16), torch.empty(4, dtype=BF16)
    scan = torch.empty_like(x)
    with interpreted(THIS):
        _reduce_kernel[(1,)](x, total, top, scan, M=4, N=64)
    # 64 terms in fp32 and one rounding: half a unit in the last place of bf16, 2^-9 relative.
    exact = x.double().sum(1)
    assert ((total.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all()
    assert torch.equal(top, x.max(1).values)
    running = x.double().cumsum(1)
    assert ((scan.double() - running).abs() <= running.abs() * 2.0**-8 + 1e-5).all()


@triton.jit
def _dot_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None, :]
    out = tl.dot(tl.load(x_ptr + tile), tl.load(y_ptr + tile), input_precision=PRECISION)
    tl.store(out_ptr + tile, out)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_dot_accumulates_in_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(32, 32, generator=generator).to(dtype)
    y = torch.randn(32, 32, generator=generator).to(dtype)
    out = torch.full((32, 32), float("nan"))
    with interpreted(THIS):
        _dot_kernel[(1,)](x, y, out, N=32, PRECISION="ieee")
    # An fp32 sum of 32 products in any order: 32 roundings of at most 2^-24 of the sum of sizes.
    bound = 32 * 2.0**-24 * (x.double().abs() @ y.double().abs())
    assert ((out.double() - x.double() @ y.double()).abs() <= bound).all()


def test_dot_without_ieee_shows_tf32() -> None:
    x = torch.full((32, 32), 1.0 + 2.0**-12)
    out = torch.empty(32, 32)
    with interpreted(THIS):
        _dot_kernel[(1,)](x, torch.eye(32), out, N=32, PRECISION="tf32")
    assert torch.equal(out, torch.ones(32, 32))


def test_everything_is_put_back() -> None:
    owners = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, lora_linear, THIS)
    before = [dict(vars(owner)) for owner in (*owners, InterpreterBuilder)]
    x = torch.ones(8, dtype=BF16)
    with interpreted(THIS), interpreted(THIS):
        _binary_kernel[(1,)](x, x, x, OP="add", N=8)
        assert not isinstance(lora_linear._lora_down_kernel, JITFunction)
    after = [dict(vars(owner)) for owner in (*owners, InterpreterBuilder)]
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        assert all(old[name] is new[name] for name in old)


def test_restored_after_a_failing_kernel_and_usable_again() -> None:
    x = torch.ones(8, dtype=BF16)
    with pytest.raises(RuntimeError), interpreted(THIS):
        raise RuntimeError
    assert isinstance(_binary_kernel, JITFunction)
    assert torch.equal(run_binary(x, x, "add"), x + x)


def test_compiling_still_works_after_interpreting() -> None:
    x = torch.ones(512, dtype=BF16)
    run_binary(x, x, "mul")
    with dry_run(90) as launches:
        _binary_kernel[(1,)](x, x, x, OP="mul", N=512)
    assert [launch.kernel for launch in launches] == ["_binary_kernel"]
    assert launches[0].resources.registers > 0

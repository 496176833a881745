"""The fixed dropout format: the same bits in every backend, independent, reproducible."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasttune import _native
from fasttune.ops import _dropout, lora_linear
from fasttune.testing.conformance import triton_on_cpu

BUILDS = _native.cpu().isa_available().split(",")


def philox_bits(seed: int, rows: range, features: int, branch: int) -> np.ndarray:
    """16-bit lanes [rows, features] as docs/design.md defines them, in Python integers."""
    mask = 0xFFFFFFFF
    lanes = np.zeros((len(rows), features), dtype=np.int64)
    for i, row in enumerate(rows):
        for k in range(features):
            c = [k // 8, row & mask, row >> 32, branch]
            key = [seed & mask, seed >> 32 & mask]
            for _ in range(7):
                p0, p2 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
                c = [p2 >> 32 ^ c[1] ^ key[0], p2 & mask, p0 >> 32 ^ c[3] ^ key[1], p0 & mask]
                key = [key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask]
            lanes[i, k] = c[k % 8 // 2] >> 16 * (k % 2) & 0xFFFF
    return lanes


CASES = [(0x0123456789ABCDEF, 0, 0), (-5, 3, 2**32 - 2), (2**63 - 1, 7, 2**40)]


@pytest.mark.parametrize(("seed", "branch", "offset"), CASES)
def test_reference_follows_the_definition(seed, branch, offset):
    expected = philox_bits(seed & (2**64 - 1), range(offset, offset + 5), 75, branch) >= 6554
    mask = _dropout.keep_mask(torch.tensor(seed), 6554, 5, 75, branch=branch, row_offset=offset)
    assert np.array_equal(mask.bool().numpy(), expected)


def mask_of(primitives, seed, threshold, rows, features, branch, offset):
    """Reads a backend's mask: ones through an identity A."""
    t = primitives.lora_down(
        torch.ones(rows, features), torch.eye(features), 1.0, None,
        seed=torch.tensor(seed), threshold=threshold, branch=branch, row_offset=offset,
    )  # fmt: skip
    return t


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("seed", "branch", "offset"), CASES)
def test_cpu_masks_are_bit_equal_to_the_reference(seed, branch, offset, build):
    previous = _native.cpu().isa_name()
    _native.cpu().set_isa(build)
    try:
        mask = mask_of(_native, seed, 6554, 37, 133, branch, offset)
    finally:
        _native.cpu().set_isa(previous)
    reference = _dropout.keep_mask(
        torch.tensor(seed), 6554, 37, 133, branch=branch, row_offset=offset
    )
    assert torch.equal(mask, reference)
    assert 0.85 < mask.mean() < 0.95


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("seed", "branch", "offset"), CASES)
def test_masks_that_two_kernels_share_are_the_same(seed, branch, offset, build):
    """A backward draws once for dx and dA; asked for one of them, it draws for that one."""
    previous = _native.cpu().isa_name()
    _native.cpu().set_isa(build)
    d, a, x = torch.randn(37, 4), torch.randn(4, 133), torch.randn(37, 133)
    place = {"seed": torch.tensor(seed), "branch": branch, "row_offset": offset}
    place |= {"threshold": 6554, "dx_dtype": torch.float32}
    try:
        dx, da = _native.lora_down_backward(d, a, x, **place, need_dx=True, need_da=True)
        alone = _native.lora_down_backward(d, a, x, **place, need_dx=True, need_da=False)
        other = _native.lora_down_backward(d, a, x, **place, need_dx=False, need_da=True)
    finally:
        _native.cpu().set_isa(previous)
    assert torch.equal(dx, alone[0]) and torch.equal(da, other[1])
    assert 0 < dx.eq(0).float().mean() < 0.2


@pytest.mark.parametrize(("seed", "branch", "offset"), CASES)
def test_triton_masks_are_bit_equal_to_the_reference(seed, branch, offset):
    with triton_on_cpu():
        from fasttune.ops import _triton

        mask = mask_of(_triton.kernels("lora_linear"), seed, 6554, 9, 75, branch, offset)
    reference = _dropout.keep_mask(
        torch.tensor(seed), 6554, 9, 75, branch=branch, row_offset=offset
    )
    assert torch.equal(mask, reference)


def test_chunks_see_the_rows_of_the_whole():
    whole = _dropout.keep_mask(torch.tensor(3), 9999, 20, 16, branch=1)
    part = _dropout.keep_mask(torch.tensor(3), 9999, 12, 16, branch=1, row_offset=8)
    assert torch.equal(whole[8:], part)


def test_rate_and_independence():
    """Keep rates and pairwise agreement of 2^20 lanes lie within five standard deviations."""
    p, rows, features = 0.05, 1024, 1024
    masks = [
        _dropout.keep_mask(torch.tensor(seed), _dropout.threshold(p), rows, features, branch=branch)
        for seed, branch in ((1, 0), (1, 1), (2, 0))
    ]
    deviation = (p * (1 - p) / masks[0].numel()) ** 0.5
    for mask in masks:
        assert abs(float(mask.mean()) - (1 - p)) < 5 * deviation
        assert abs(float((mask[:, 1:] * mask[:, :-1]).mean()) - (1 - p) ** 2) < 5 * 2 * deviation
        assert abs(float((mask[1:] * mask[:-1]).mean()) - (1 - p) ** 2) < 5 * 2 * deviation
    both = [float((masks[0] * other).mean()) for other in masks[1:]]
    assert all(abs(rate - (1 - p) ** 2) < 5 * 2 * deviation for rate in both)


def test_expectation_is_kept():
    x, a, b = torch.randn(4, 64), torch.randn(8, 64), torch.randn(32, 8)
    weight = torch.zeros(32, 64)
    exact = x @ a.t() @ b.t()
    draws = torch.stack([lora_linear(x, weight, a, b, dropout_p=0.25) for _ in range(2000)])
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / 2000**0.5)
    assert float(error.max()) < 6


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_probability_out_of_range(p):
    with pytest.raises(ValueError, match="dropout_p: expected a probability"):
        lora_linear(
            torch.ones(1, 8), torch.ones(2, 8), torch.ones(1, 8), torch.ones(2, 1), dropout_p=p
        )


def test_seed_comes_from_the_generator_of_torch():
    torch.manual_seed(5)
    first = _dropout.draw_seed(torch.device("cpu"))
    second = _dropout.draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(_dropout.draw_seed(torch.device("cpu")), first)
    assert not torch.equal(first, second)

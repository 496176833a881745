"""What the launcher of ia3_scale's gradients would launch on every GPU generation, compiled without
a GPU; the forward is scaled_sum.
"""

from __future__ import annotations

import pytest
import torch
from norm_launches import DTYPES, TOKENS, assert_fits

from fasttune.testing.triton_compile import GPU_LIMITS, count_global_stores
from fasttune.testing.triton_dry_run import Launch, dry_run
from fasttune_kernels.ia3_scale import ia3_scale_backward
from fasttune_kernels.scaled_sum import scaled_sum

BF16, FP32 = torch.bfloat16, torch.float32
COMMON = [(capability, "bf16", 8192) for capability in (80, 90, 120)]
ALL = [
    (capability, dtype, features)
    for capability in sorted(GPU_LIMITS)
    for dtype in DTYPES
    for features in (1024, 2560, 8192)  # keys and values, a head that is no power of two, an MLP
    if capability >= 80 or dtype != "bf16"
]


def launches_of(capability: int, dtype: torch.dtype, features: int, need_dx: bool) -> list[Launch]:
    x = torch.empty(TOKENS, features, dtype=dtype)
    with dry_run(capability) as launches:
        ia3_scale_backward(x, x.clone(), torch.empty(features), need_dx=need_dx)
    return launches


@pytest.mark.parametrize("need_dx", [True, False])
@pytest.mark.parametrize(
    ("capability", "dtype", "features"),
    [
        pytest.param(
            *case, id="-".join(map(str, case)), marks=() if case in COMMON else pytest.mark.slow
        )
        for case in ALL
    ],
)
def test_launches(capability: int, dtype: str, features: int, need_dx: bool) -> None:
    launches = launches_of(capability, DTYPES[dtype], features, need_dx)
    assert [launch.kernel for launch in launches] == [
        "_ia3_scale_backward_kernel",
        "_sum_rows_kernel",
    ]
    for launch in launches:
        assert_fits(launch)
    backward = launches[0]
    columns, splits, _ = backward.grid
    assert columns * backward.constants["BLOCK_N"] == features
    # Twice, less what rounding 64 rows or more up to a multiple of 16 takes away.
    assert columns * splits >= 2 * backward.limits.multiprocessors * 64 / (64 + 16)
    assert {"dy_ptr", "x_ptr"} <= backward.divisible_by_16
    wide = count_global_stores(backward.instructions, bits=128)
    size = DTYPES[dtype].itemsize
    tile = backward.constants["BLOCK_M"] * backward.constants["BLOCK_N"]
    stores = tile * size // (16 * 32 * backward.num_warps)
    assert wide >= (stores if need_dx else 0)
    if capability >= 80:  # both operands are copied ahead, without registers
        assert any(name.startswith("LDGSTS") for name in backward.instructions)
        ahead = backward.constants["STAGES"] - 1
        in_flight = backward.resident_programs * ahead * tile * 2 * size
        assert in_flight >= backward.limits.bytes_in_flight


def test_forward_and_a_frozen_scale_are_one_launch() -> None:
    x, scale = torch.empty(TOKENS, 8192, dtype=BF16), torch.empty(8192)
    with dry_run(90) as launches:
        scaled_sum(x, None, scale, 1.0, seed=None, threshold=0, out_dtype=BF16)
    (launch,) = launches
    assert_fits(launch)
    assert count_global_stores(launch.instructions, bits=128) >= 2
    assert count_global_stores(launch.instructions) == count_global_stores(
        launch.instructions, bits=128
    )


def test_changing_row_counts_compile_nothing_new() -> None:
    scale = torch.empty(1024)
    with dry_run(90) as launches:
        for rows in (TOKENS, 1, 16, 4097):
            x = torch.empty(rows, 1024, dtype=BF16)
            ia3_scale_backward(x, x.clone(), scale, need_dx=True)
    assert len(launches) == 8 and len({launch.cubin for launch in launches}) == 2


@pytest.mark.parametrize(("dy", "x"), [(BF16, FP32), (FP32, BF16)])
def test_mixed_dtypes_compile_without_spills(dy: torch.dtype, x: torch.dtype) -> None:
    with dry_run(90) as launches:
        ia3_scale_backward(
            torch.empty(TOKENS, 4096, dtype=dy),
            torch.empty(TOKENS, 4096, dtype=x),
            torch.empty(4096, dtype=BF16),
            need_dx=True,
        )
    assert len(launches) == 2
    for launch in launches:
        assert_fits(launch)

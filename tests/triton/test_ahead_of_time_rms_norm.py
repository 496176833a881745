"""What the launchers of rms_norm would launch on every GPU generation, compiled without a GPU.

8192 rows; `-m slow` adds the other architectures, dtypes and row lengths to the common ones.
"""

from __future__ import annotations

import pytest
import torch
from norm_launches import (
    ALL,
    COMMON,
    DTYPES,
    TOKENS,
    assert_fits,
    assert_rows_are_moved_wide,
    bytes_in_flight,
)

from fasttune.testing.triton_dry_run import Launch, dry_run
from fasttune_kernels.rms_norm import add_rms_norm_forward, rms_norm_backward, rms_norm_forward

BF16, FP32 = torch.bfloat16, torch.float32
OPTIONS = {"eps": 1e-6, "weight_offset": 0.0, "round_first": True}


def launches_of(capability: int, dtype: torch.dtype, features: int) -> list[Launch]:
    x, weight = torch.empty(TOKENS, features, dtype=dtype), torch.empty(features, dtype=dtype)
    rstd = torch.empty(TOKENS)
    needs = {"weight_offset": 0.0, "need_dx": True}
    with dry_run(capability) as launches:
        rms_norm_forward(x, weight, **OPTIONS, out_dtype=dtype)
        add_rms_norm_forward(x, x, weight, **OPTIONS, out_dtype=dtype)
        rms_norm_backward(x, x, weight, rstd, None, **needs, need_dweight=False)
        rms_norm_backward(x, x, weight, rstd, x, **needs, need_dweight=True)
    return launches


@pytest.mark.parametrize(
    ("capability", "dtype", "features"),
    [
        pytest.param(
            *case,
            id="-".join(map(str, case)),
            marks=() if case in COMMON else pytest.mark.slow,
        )
        for case in ALL
    ],
)  # fmt: skip
def test_launches(capability: int, dtype: str, features: int) -> None:
    launches = launches_of(capability, DTYPES[dtype], features)
    wide = features > 8192
    assert [launch.kernel for launch in launches] == [
        "_rms_norm_forward_kernel",
        "_rms_norm_forward_kernel",
        "_rms_norm_backward_kernel",
        "_rms_norm_backward_kernel",
        *(["_norm_column_sums_kernel"] if wide else []),
        "_sum_rows_kernel",
    ]
    for launch in launches:
        assert_fits(launch)
    for launch in launches[:4]:
        assert_rows_are_moved_wide(launch)
        # 8192 short rows are too few to fill a large GPU.
        if features >= 2048:
            assert bytes_in_flight(launch) >= launch.limits.bytes_in_flight, launch


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "out_dtype"), [(BF16, FP32, FP32), (FP32, BF16, FP32)]
)
def test_mixed_dtypes_compile_without_spills(x_dtype, weight_dtype, out_dtype) -> None:
    x, weight = torch.empty(TOKENS, 4096, dtype=x_dtype), torch.empty(4096, dtype=weight_dtype)
    with dry_run(90) as launches:
        y, rstd = rms_norm_forward(x, weight, **OPTIONS, out_dtype=out_dtype)
        needs = {"weight_offset": 0.0, "need_dx": True, "need_dweight": True}
        rms_norm_backward(y, x, weight, rstd, x, **needs)
    assert len(launches) == 3
    for launch in launches:
        assert_fits(launch)


def test_changing_row_counts_compile_nothing_new() -> None:
    weight = torch.empty(1024, dtype=BF16)
    with dry_run(90) as launches:
        for rows in (TOKENS, 1, 16, 4097):
            x = torch.empty(rows, 1024, dtype=BF16)
            y, rstd = rms_norm_forward(x, weight, **OPTIONS, out_dtype=BF16)
            needs = {"weight_offset": 0.0, "need_dx": True, "need_dweight": True}
            rms_norm_backward(y, x, weight, rstd, None, **needs)
    assert len(launches) == 12 and len({launch.cubin for launch in launches}) == 3


def test_grids_cover_every_row_and_persist_for_sums() -> None:
    launches = launches_of(90, BF16, 128)
    rows = launches[0].constants["BLOCK_M"]
    assert [launch.grid[0] for launch in launches[:3]] == [TOKENS // rows] * 3
    persistent = launches[3]
    assert persistent.grid == (min(2 * 132, TOKENS // persistent.constants["BLOCK_M"]), 1, 1)
    assert launches[4].grid == (128 // launches[4].constants["BLOCK_N"], 1, 1)


def test_weight_gradients_alone_read_no_whole_rows() -> None:
    x, rstd = torch.empty(TOKENS, 4096, dtype=BF16), torch.empty(TOKENS)
    with dry_run(90) as launches:
        needs = {"weight_offset": 0.0, "need_dx": False, "need_dweight": True}
        rms_norm_backward(x, x, None, rstd, None, **needs)
    sums, second = launches
    assert (sums.kernel, second.kernel) == ("_norm_column_sums_kernel", "_sum_rows_kernel")
    columns, splits, _ = sums.grid
    assert columns * sums.constants["BLOCK_H"] == 4096 and columns * splits >= 2 * 132
    assert_fits(sums)
    assert any(name.startswith("LDGSTS") for name in sums.instructions)
    assert sums.resident_programs * 3 * 16 * 128 * 4 >= sums.limits.bytes_in_flight

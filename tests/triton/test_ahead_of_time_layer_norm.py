"""What the launchers of layer_norm would launch on every GPU generation, compiled without a GPU.

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
from fasttune_kernels.layer_norm import (
    add_layer_norm_forward,
    layer_norm_backward,
    layer_norm_forward,
)

BF16, FP32 = torch.bfloat16, torch.float32
OPTIONS = {"eps": 1e-5, "weight_offset": 0.0}


def launches_of(capability: int, dtype: torch.dtype, features: int) -> list[Launch]:
    x, weight = torch.empty(TOKENS, features, dtype=dtype), torch.empty(features, dtype=dtype)
    stats = torch.empty(TOKENS), torch.empty(TOKENS)
    needs = {"weight_offset": 0.0, "need_dx": True}
    with dry_run(capability) as launches:
        layer_norm_forward(x, weight, weight, **OPTIONS, out_dtype=dtype)
        add_layer_norm_forward(x, x, weight, weight, **OPTIONS, out_dtype=dtype)
        layer_norm_backward(
            x, x, weight, *stats, None, **needs, need_dweight=False, need_dbias=False
        )
        layer_norm_backward(x, x, weight, *stats, x, **needs, need_dweight=True, need_dbias=True)
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
        "_layer_norm_forward_kernel",
        "_layer_norm_forward_kernel",
        "_layer_norm_backward_kernel",
        "_layer_norm_backward_kernel",
        *(["_norm_column_sums_kernel"] if wide else []),
        "_sum_rows_kernel",
        "_sum_rows_kernel",
    ]
    for launch in launches:
        assert_fits(launch)
    for launch in launches[:4]:
        assert_rows_are_moved_wide(launch)
        # Two reductions of a row take registers: long rows in 16 bits leave a B200 three quarters
        # of the bytes it wants. 8192 short rows are too few to fill a large GPU.
        wanted = launch.limits.bytes_in_flight * (0.7 if capability == 100 else 1)
        if features >= 2048:
            assert bytes_in_flight(launch) >= wanted, launch


@pytest.mark.parametrize(("x_dtype", "weight_dtype"), [(BF16, FP32), (FP32, BF16)])
def test_mixed_dtypes_compile_without_spills(x_dtype, weight_dtype) -> None:
    x, weight = torch.empty(TOKENS, 4096, dtype=x_dtype), torch.empty(4096, dtype=weight_dtype)
    needs = {"need_dx": True, "need_dweight": True, "need_dbias": True}
    with dry_run(90) as launches:
        y, *stats = layer_norm_forward(x, weight, weight, **OPTIONS, out_dtype=x_dtype)
        layer_norm_backward(y, x, weight, *stats, None, weight_offset=0.0, **needs)
    assert len(launches) == 4
    for launch in launches:
        assert_fits(launch)


def test_changing_row_counts_compile_nothing_new() -> None:
    weight = torch.empty(1024, dtype=BF16)
    needs = {"need_dx": True, "need_dweight": True, "need_dbias": False}
    with dry_run(90) as launches:
        for rows in (TOKENS, 1, 16, 4097):
            x = torch.empty(rows, 1024, dtype=BF16)
            y, *stats = layer_norm_forward(x, weight, None, **OPTIONS, out_dtype=BF16)
            layer_norm_backward(y, x, weight, *stats, None, weight_offset=0.0, **needs)
    assert len(launches) == 12 and len({launch.cubin for launch in launches}) == 3


def test_bias_gradients_alone_do_not_read_x() -> None:
    x, stats = torch.empty(TOKENS, 4096, dtype=BF16), (torch.empty(TOKENS), torch.empty(TOKENS))
    needs = {"need_dx": False, "need_dweight": False, "need_dbias": True}
    with dry_run(90) as launches:
        layer_norm_backward(x, x, None, *stats, None, weight_offset=0.0, **needs)
    sums, second = launches
    assert (sums.kernel, second.kernel) == ("_norm_column_sums_kernel", "_sum_rows_kernel")
    assert "x_ptr" not in sums.divisible_by_16 and sums.signature["x_ptr"] == "constexpr"
    assert_fits(sums)

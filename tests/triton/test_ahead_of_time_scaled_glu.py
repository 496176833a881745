"""What the launchers of scaled_glu would launch on every GPU generation, compiled without a GPU."""

from __future__ import annotations

import pytest
import torch
from norm_launches import DTYPES, TOKENS, assert_fits
from torch import Tensor

from fasttune.testing.triton_compile import GPU_LIMITS, count_global_stores
from fasttune.testing.triton_dry_run import Launch, dry_run
from fasttune_kernels.scaled_glu import scaled_glu_backward, scaled_glu_forward

BF16, FP32 = torch.bfloat16, torch.float32
COMMON = [(capability, "bf16", "silu") for capability in (80, 90, 120)]
ALL = [
    (capability, dtype, activation)
    for capability in sorted(GPU_LIMITS)
    for dtype in DTYPES
    for activation in ("silu", "gelu", "gelu_tanh")
    if capability >= 80 or dtype != "bf16"
]
FEATURES = 8192


def launches_of(
    capability: int, dtype: torch.dtype, activation: str, need_dscale: bool = True
) -> list[Launch]:
    gate, up, dy, dgate, dup = (torch.empty(TOKENS, FEATURES, dtype=dtype) for _ in range(5))
    scale = torch.empty(FEATURES)
    with dry_run(capability) as launches:
        scaled_glu_forward(gate, up, scale, activation=activation)
        scaled_glu_backward(
            dy, gate, up, scale,
            activation=activation, dgate=dgate, dup=dup, need_dscale=need_dscale,
        )  # fmt: skip
    return launches


@pytest.mark.parametrize(
    ("capability", "dtype", "activation"),
    [
        pytest.param(
            *case, id="-".join(map(str, case)), marks=() if case in COMMON else pytest.mark.slow
        )
        for case in ALL
    ],
)
def test_launches(capability: int, dtype: str, activation: str) -> None:
    launches = launches_of(capability, DTYPES[dtype], activation)
    assert [launch.kernel for launch in launches] == [
        "_scaled_glu_forward_kernel",
        "_scaled_glu_backward_kernel",
        "_sum_rows_kernel",
    ]
    for launch in launches:
        assert_fits(launch)
    forward, backward, _ = launches
    columns, splits, _ = backward.grid
    assert columns * backward.constants["BLOCK_N"] == FEATURES
    # Twice, less what rounding 64 rows or more up to a multiple of 16 takes away.
    assert columns * splits >= 2 * backward.limits.multiprocessors * 64 / (64 + 16)
    size = DTYPES[dtype].itemsize
    tile = backward.constants["BLOCK_M"] * backward.constants["BLOCK_N"]
    stores = 2 * tile * size // (16 * 32 * backward.num_warps)
    assert count_global_stores(forward.instructions, bits=128) >= 2
    assert count_global_stores(backward.instructions, bits=128) >= stores
    if capability >= 80:  # the three operands are copied ahead, without registers
        assert any(name.startswith("LDGSTS") for name in backward.instructions)
        ahead = backward.constants["STAGES"] - 1
        in_flight = backward.resident_programs * ahead * tile * 3 * size
        assert in_flight >= backward.limits.bytes_in_flight


def test_a_frozen_scale_has_no_second_pass() -> None:
    launches = launches_of(90, BF16, "silu", need_dscale=False)
    assert [launch.kernel for launch in launches] == [
        "_scaled_glu_forward_kernel",
        "_scaled_glu_backward_kernel",
    ]
    for launch in launches:
        assert_fits(launch)


def test_changing_row_counts_compile_nothing_new() -> None:
    scale = torch.empty(1024)

    def run(rows: int) -> None:
        gate, up, dy, dgate, dup = (torch.empty(rows, 1024, dtype=BF16) for _ in range(5))
        scaled_glu_forward(gate, up, scale, activation="silu")
        scaled_glu_backward(
            dy, gate, up, scale, activation="silu", dgate=dgate, dup=dup, need_dscale=True
        )

    with dry_run(90) as launches:
        for rows in (TOKENS, 1, 16, 4097):
            run(rows)
    assert len(launches) == 12 and len({launch.cubin for launch in launches}) == 3


@pytest.mark.parametrize("packed", [True, False])
def test_halves_of_a_packed_tensor_and_two_dtypes_fit(packed: bool) -> None:
    def pair() -> tuple[Tensor, Tensor]:
        if packed:
            first, second = torch.empty(TOKENS, 2 * FEATURES, dtype=BF16).chunk(2, dim=-1)
            return first, second
        return torch.empty(TOKENS, FEATURES, dtype=BF16), torch.empty(TOKENS, FEATURES)

    (gate, up), (dgate, dup) = pair(), pair()
    with dry_run(90) as launches:
        y = scaled_glu_forward(gate, up, torch.empty(FEATURES), activation="silu")
        scaled_glu_backward(
            y, gate, up, torch.empty(FEATURES),
            activation="silu", dgate=dgate, dup=dup, need_dscale=True,
        )  # fmt: skip
    assert y.dtype == (BF16 if packed else FP32) and len(launches) == 3
    for launch in launches:
        assert_fits(launch)

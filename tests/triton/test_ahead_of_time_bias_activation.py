"""What the launchers of bias_activation would launch on every GPU generation, without a GPU."""

from __future__ import annotations

import pytest
import torch

from fasttune.testing.triton_compile import GPU_LIMITS, count_global_loads, count_global_stores
from fasttune.testing.triton_dry_run import Launch, dry_run
from fasttune_kernels.bias_activation import bias_activation_backward, bias_activation_forward

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS, INTERMEDIATE = 8192, 16384
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
ACTIVATIONS = (
    "silu",
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "relu",
    "relu2",
    "tanh",
    "sigmoid",
    "leaky_relu",
)

COMMON = [(capability, "bf16", "gelu_tanh") for capability in (80, 90, 120)]
ALL = [
    (capability, dtype, activation)
    for capability in sorted(GPU_LIMITS)
    for dtype in DTYPES
    for activation in ACTIVATIONS
    if capability >= 80 or dtype != "bf16"
]
CASES = [
    pytest.param(
        *case, id="-".join(map(str, case)), marks=() if case in COMMON else pytest.mark.slow
    )
    for case in ALL
]


def launches_of(
    capability: int, dtype: torch.dtype, activation: str, has_bias: bool
) -> list[Launch]:
    x = torch.empty(TOKENS, INTERMEDIATE, dtype=dtype)
    bias = torch.empty(INTERMEDIATE, dtype=dtype) if has_bias else None
    with dry_run(capability) as launches:
        y = bias_activation_forward(x, bias, activation=activation)
        bias_activation_backward(y, x, bias, activation=activation, dx_dtype=dtype)
    return launches


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("capability", "dtype", "activation"), CASES)
def test_launches(capability: int, dtype: str, activation: str, has_bias: bool) -> None:
    launches = launches_of(capability, DTYPES[dtype], activation, has_bias)
    assert [launch.kernel for launch in launches] == [
        "_bias_activation_forward_kernel",
        "_bias_activation_backward_kernel",
    ]
    for launch, operands in zip(launches, (1, 2), strict=True):
        assert not launch.resources.spills, launch
        assert launch.shared_bytes <= launch.limits.shared_bytes_per_block
        instructions = launch.instructions
        # Two accesses of 16 bytes a thread to each operand; the piece of the bias is smaller.
        wide = count_global_loads(instructions, bits=128)
        assert wide >= 2 * operands
        assert count_global_loads(instructions) <= 2 * operands + int(has_bias)
        assert count_global_stores(instructions, bits=128) == 2
        assert count_global_stores(instructions) == 2
        in_flight = launch.resident_programs * 32 * launch.num_warps * 32 * operands
        # One operand in 16 bits is two bytes for 20 or more operations: on a B200 they bind it.
        if not (capability == 100 and operands == 1 and dtype != "fp32"):
            assert in_flight >= launch.limits.bytes_in_flight


def test_grids_cover_every_element_and_the_bias_is_read_once_for_four_rows() -> None:
    with dry_run(90) as launches:
        for rows, columns in ((TOKENS, INTERMEDIATE), (1, 1), (3, 1051), (8191, 768)):
            x = torch.empty(rows, columns, dtype=BF16)
            bias_activation_forward(x, torch.empty(columns), activation="silu")
    for launch, (rows, columns) in zip(
        launches, ((TOKENS, INTERMEDIATE), (1, 1), (3, 1051), (8191, 768)), strict=True
    ):
        block_m, block_n = launch.constants["BLOCK_M"], launch.constants["BLOCK_N"]
        assert block_m == 4
        assert launch.grid == (-(-rows // 4) * -(-columns // block_n), 1, 1)


def test_changing_row_counts_compile_nothing_new() -> None:
    bias = torch.empty(INTERMEDIATE, dtype=BF16)
    with dry_run(90) as launches:
        for rows in (TOKENS, 1, 4097, 8191):
            x = torch.empty(rows, INTERMEDIATE, dtype=BF16)
            bias_activation_forward(x, bias, activation="silu")
    assert len({launch.cubin for launch in launches}) == 1

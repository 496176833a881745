"""What the launchers of glu would launch on every GPU generation, compiled without a GPU."""

from __future__ import annotations

import pytest
import torch

from fasttune.testing.triton_compile import GPU_LIMITS, count_global_loads, count_global_stores
from fasttune.testing.triton_dry_run import Launch, dry_run
from fasttune_kernels.glu import glu_backward, glu_forward

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS, INTERMEDIATE = 8192, 14336
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

COMMON = [(capability, "bf16", name) for capability in (80, 90, 120) for name in ("silu", "gelu")]
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


def launches_of(capability: int, dtype: torch.dtype, activation: str) -> list[Launch]:
    """Forward and backward of a packed pair: rows lie apart, as they do in two tensors or one."""
    gate, up = torch.empty(TOKENS, 2 * INTERMEDIATE, dtype=dtype).chunk(2, -1)
    dgate, dup = torch.empty(TOKENS, 2 * INTERMEDIATE, dtype=dtype).chunk(2, -1)
    with dry_run(capability) as launches:
        y = glu_forward(gate, up, activation=activation)
        glu_backward(y, gate, up, activation=activation, dgate=dgate, dup=dup)
    return launches


def bytes_in_flight(launch: Launch, loads: int) -> int:
    """All loads of a program are issued before its arithmetic: 16 bytes a thread each."""
    return launch.resident_programs * 32 * launch.num_warps * 16 * loads


@pytest.mark.parametrize(("capability", "dtype", "activation"), CASES)
def test_launches(capability: int, dtype: str, activation: str) -> None:
    launches = launches_of(capability, DTYPES[dtype], activation)
    assert [launch.kernel for launch in launches] == ["_glu_forward_kernel", "_glu_backward_kernel"]
    for launch, operands, results in zip(launches, (2, 3), (1, 2), strict=True):
        assert not launch.resources.spills, launch
        assert launch.shared_bytes == 0
        instructions = launch.instructions
        # Two accesses of 16 bytes a thread to each operand, and no narrower ones.
        assert count_global_loads(instructions, bits=128) == 2 * operands
        assert count_global_loads(instructions) == 2 * operands
        assert count_global_stores(instructions, bits=128) == 2 * results
        assert count_global_stores(instructions) == 2 * results
        assert bytes_in_flight(launch, 2 * operands) >= launch.limits.bytes_in_flight


@pytest.mark.parametrize("gate_dtype", [BF16, FP32])
def test_mixed_dtypes_compile_without_spills(gate_dtype: torch.dtype) -> None:
    gate = torch.empty(TOKENS, INTERMEDIATE, dtype=gate_dtype)
    up = torch.empty(TOKENS, INTERMEDIATE, dtype=FP32 if gate_dtype == BF16 else FP16)
    with dry_run(90) as launches:
        y = glu_forward(gate, up, activation="silu")
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        glu_backward(y, gate, up, activation="silu", dgate=dgate, dup=dup)
    assert y.dtype == FP32
    for launch in launches:
        assert not launch.resources.spills, launch


def test_grids_cover_every_element() -> None:
    whole = torch.empty(TOKENS, INTERMEDIATE, dtype=BF16)
    with dry_run(90) as launches:
        glu_forward(whole, whole, activation="silu")  # contiguous: one long row
        for rows, columns in ((1, 1), (3, 1051), (TOKENS, INTERMEDIATE - 1)):
            part = torch.empty(rows, columns + 1, dtype=BF16)[:, :columns]
            glu_forward(part, part, activation="silu")
    for launch, (rows, columns) in zip(
        launches,
        ((1, TOKENS * INTERMEDIATE), (1, 1), (3, 1051), (TOKENS, INTERMEDIATE - 1)),
        strict=True,
    ):
        block = launch.constants["BLOCK"]
        assert launch.grid == (rows * -(-columns // block), 1, 1)
        assert launch.num_warps * 32 * 16 == block  # 16 elements of 16 bits a thread


def test_unneeded_gradients_are_neither_computed_nor_written() -> None:
    x = torch.empty(TOKENS, INTERMEDIATE, dtype=BF16)
    with dry_run(90) as launches:
        glu_backward(x, x, x, activation="silu", dgate=torch.empty_like(x), dup=None)
        glu_backward(x, x, x, activation="silu", dgate=None, dup=torch.empty_like(x))
    for launch, loads in zip(launches, (6, 4), strict=True):
        assert count_global_loads(launch.instructions) == loads
        assert count_global_stores(launch.instructions) == 2


def test_changing_row_counts_compile_nothing_new() -> None:
    with dry_run(90) as launches:
        for rows in (TOKENS, 2, 4097, 8191):
            gate, up = torch.empty(rows, 2 * INTERMEDIATE, dtype=BF16).chunk(2, -1)
            glu_forward(gate, up, activation="silu")
    assert len({launch.cubin for launch in launches}) == 1

"""What the ahead-of-time tests of rms_norm and layer_norm assert on a launch."""

from __future__ import annotations

import torch

from fasttune.testing.triton_compile import GPU_LIMITS, count_global_loads, count_global_stores
from fasttune.testing.triton_dry_run import Launch

TOKENS = 8192
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ELEMENT_SIZE = {"*bf16": 2, "*fp16": 2, "*fp32": 4}
ROWS_IN = ("x_ptr", "residual_ptr", "dy_ptr", "addend_ptr")
ROWS_OUT = ("y_ptr", "s_ptr", "dx_ptr")

COMMON = [*((capability, "bf16", 4096) for capability in (80, 90, 120)), (90, "bf16", 128)]
ALL = [
    (capability, dtype, features)
    for capability in sorted(GPU_LIMITS)
    for dtype in DTYPES
    # A head, a small model, a row block of several rows, Llama's, one with a mask, the longest.
    for features in (64, 128, 576, 1024, 2048, 4096, 5120, 8192, 16384)
    if capability >= 80 or dtype != "bf16"
]


def pointers(launch: Launch, names: tuple[str, ...]) -> list[int]:
    """Element sizes of the operands of whole rows that this launch has."""
    types = (launch.signature.get(name, "constexpr") for name in names)
    return [ELEMENT_SIZE[kind] for kind in types if kind in ELEMENT_SIZE]


def assert_fits(launch: Launch) -> None:
    assert not launch.resources.spills, launch
    assert launch.shared_bytes <= launch.limits.shared_bytes_per_block
    assert launch.resident_programs >= 1, launch


def bytes_in_flight(launch: Launch) -> int:
    """What one multiprocessor has requested while it computes: all operands of a step a program,
    for the steps that are loaded ahead.
    """
    constants = launch.constants
    step = constants["BLOCK_M"] * constants["BLOCK_H"] * sum(pointers(launch, ROWS_IN))
    return launch.resident_programs * step * max(constants.get("STAGES", 1) - 1, 1)


def assert_rows_are_moved_wide(launch: Launch) -> None:
    """Every operand of whole rows was specialised as aligned and moves 16 bytes at a time."""
    names = [name for name in (*ROWS_IN, *ROWS_OUT) if launch.signature.get(name) in ELEMENT_SIZE]
    assert set(names) <= launch.divisible_by_16
    tile = launch.constants["BLOCK_M"] * launch.constants["BLOCK_H"]
    width = 16 * 32 * launch.num_warps
    instructions = launch.instructions
    loads = sum(max(tile * size // width, 1) for size in pointers(launch, ROWS_IN))
    stores = sum(max(tile * size // width, 1) for size in pointers(launch, ROWS_OUT))
    assert count_global_loads(instructions, bits=128) >= loads, instructions
    assert count_global_stores(instructions, bits=128) >= stores, instructions
    # Narrow: the statistics of a row, and the weight and bias of a tile of several rows.
    narrow = count_global_stores(instructions) - count_global_stores(instructions, bits=128)
    assert narrow <= 2 + (2 if "dweight_ptr" in launch.signature else 0), instructions
    if launch.constants["BLOCK_M"] == 1:
        narrow = count_global_loads(instructions) - count_global_loads(instructions, bits=128)
        assert narrow <= 2 * launch.constants.get("STAGES", 1), instructions

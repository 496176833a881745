"""What the launcher of rope would launch on every GPU generation, compiled without a GPU.

Heads as in Llama-3-8B: 32 of queries, 8 of keys, 128 features, 2 x 4096 tokens. `-m slow` adds the
other architectures, dtypes and widths to the common ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fasttune.testing.triton_compile import GPU_LIMITS, count_global_loads, count_global_stores
from fasttune.testing.triton_dry_run import Launch, dry_run
from fasttune_kernels.rope import rope_backward, rope_forward

BATCH, POSITIONS, HEADS, KV_HEADS = 2, 4096, 32, 8
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WIDTHS = {"full": (128, 128), "partial": (128, 32), "width-80": (80, 80), "width-256": (256, 256)}
EXTREME = (256, 16)  # few features rotate

COMMON = [
    (capability, "bf16", angles, width, interleaved)
    for capability in (80, 90, 120)
    for angles, width, interleaved in (
        ("bf16", "full", False),
        ("bf16", "full", True),
        ("fp32", "partial", False),
    )
]
ALL = [
    (capability, x, angles, width, interleaved)
    for capability in sorted(GPU_LIMITS)
    for x, angles in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32"))
    for width in WIDTHS
    for interleaved in (False, True)
    if capability >= 80 or x != "bf16"
]
CASES = [
    pytest.param(
        *case, id="-".join(map(str, case)), marks=() if case in COMMON else pytest.mark.slow
    )
    for case in ALL
]


@pytest.fixture(autouse=True)
def ordinary_allocations() -> Iterator[None]:
    """Nothing here may touch the memory that `torch.empty` only reserves."""
    assert not torch.are_deterministic_algorithms_enabled()
    yield


def operands(heads: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A transposed view of [B, S, H, D] and where its rotation goes."""
    x = torch.empty(BATCH, POSITIONS, heads, features, dtype=dtype).transpose(1, 2)
    return x, torch.empty_like(x)


def launches_of(
    capability: int, x: str, angles: str, width: str, interleaved: bool, *, keys: str | None = None
) -> list[Launch]:
    features, rotary = WIDTHS[width]
    q, q_out = operands(HEADS, features, DTYPES[x])
    k, k_out = operands(KV_HEADS, features, DTYPES[keys or x])
    cos, sin = (torch.empty(1, POSITIONS, rotary, dtype=DTYPES[angles]) for _ in range(2))
    with dry_run(capability) as launches:
        rope_forward(q, k, cos, sin, interleaved=interleaved, q_out=q_out, k_out=k_out)
        rope_backward(q, k, cos, sin, interleaved=interleaved, dq_out=q_out, dk_out=k_out)
    return launches


def bytes_in_flight(launch: Launch) -> int:
    """What the programs of one multiprocessor load of x before they need any of it.

    A program rotates all of its heads at once and then copies some at a time. The programs are
    independent, so each phase counts by its share of the time, which is its share of the bytes.
    """
    constants = launch.constants
    rotated, copied = constants["R"], constants["D"] - constants["R"]
    columns = constants["BLOCK_H"] * rotated * rotated + constants["COPIED_H"] * copied * copied
    element = {"*bf16": 2, "*fp16": 2, "*fp32": 4}[launch.signature["q_ptr"]]
    rows = launch.resident_programs * constants["BLOCK_S"]
    return rows * columns * element // constants["D"]


@pytest.mark.parametrize(("capability", "x", "angles", "width", "interleaved"), CASES)
def test_one_launch_of_wide_accesses(
    capability: int, x: str, angles: str, width: str, interleaved: bool
) -> None:
    launches = launches_of(capability, x, angles, width, interleaved)
    assert [launch.kernel for launch in launches] == ["_rope_kernel"] * 2
    for launch in launches:
        assert not launch.resources.spills, launch
        assert launch.shared_bytes <= launch.limits.shared_bytes_per_block
        assert {"q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"} <= launch.divisible_by_16
        instructions = launch.instructions
        assert count_global_loads(instructions, bits=128) == count_global_loads(instructions) > 0
        assert count_global_stores(instructions, bits=128) == count_global_stores(instructions) > 0
        if x == angles:  # else the angles are redistributed, from their vectors of 4 to those of 8
            assert launch.shared_bytes == 0
        # 80 features leave three of eight lanes of a power of two idle, too many for a B200.
        if capability != 100 or width != "width-80":
            assert bytes_in_flight(launch) >= launch.limits.bytes_in_flight


@pytest.mark.parametrize("x", ["bf16", "fp32"])
def test_copying_most_of_a_row_does_not_spill(x: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WIDTHS, "extreme", EXTREME)
    for launch in launches_of(90, x, x, "extreme", False):
        assert not launch.resources.spills, launch


def test_programs_cover_every_head_and_position() -> None:
    for launch in launches_of(90, "bf16", "bf16", "full", False):
        constants = launch.constants
        blocks = (HEADS + KV_HEADS) // constants["BLOCK_H"]
        assert launch.grid == (BATCH * POSITIONS // constants["BLOCK_S"] * blocks, 1, 1)
        assert launch.programs >= launch.limits.multiprocessors


def test_queries_and_keys_of_two_dtypes_take_two_launches() -> None:
    launches = launches_of(90, "bf16", "bf16", "full", False, keys="fp32")
    types = [launch.signature["q_ptr"] for launch in launches]
    assert types == ["*bf16", "*fp32"] * 2


def test_changing_lengths_and_heads_compile_nothing_new() -> None:
    with dry_run(90) as launches:
        for positions, heads in ((4096, 32), (4097, 31), (333, 1), (20, 7)):
            q = torch.empty(2, positions, heads, 128, dtype=torch.bfloat16).transpose(1, 2)
            cos = torch.empty(1, positions, 128, dtype=torch.bfloat16)
            rope_forward(
                q, None, cos, cos, interleaved=False, q_out=torch.empty_like(q), k_out=None
            )
    assert len(launches) == 4 and len({launch.cubin for launch in launches}) == 1


def test_unaligned_rows_compile_to_narrow_accesses() -> None:
    q = torch.empty(2, 4096, 32, 129, dtype=torch.bfloat16)[..., 1:].transpose(1, 2)
    cos = torch.empty(1, 4096, 128, dtype=torch.bfloat16)
    with dry_run(90) as launches:
        out = torch.empty(2, 32, 4096, 128, dtype=torch.bfloat16)
        rope_forward(q, None, cos, cos, interleaved=False, q_out=out, k_out=None)
    assert "q_ptr" not in launches[0].divisible_by_16
    instructions = launches[0].instructions
    assert 0 < count_global_loads(instructions, bits=128) < count_global_loads(instructions)

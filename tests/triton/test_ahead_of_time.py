"""What the launchers would launch on every GPU generation, compiled and read without a GPU.

The launchers run at the shapes of Llama-3-8B (hidden 4096, intermediate 14336, vocabulary 128256)
on 8192 tokens. `-m slow` adds the other architectures, dtypes and ranks to the common ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fasttune.testing.triton_compile import (
    GPU_LIMITS,
    count_global_loads,
    count_global_stores,
    count_tensor_core,
)
from fasttune.testing.triton_dry_run import Launch, dry_run
from fasttune_kernels.linear_cross_entropy import cross_entropy_rows_
from fasttune_kernels.lora_linear import (
    drop,
    lora_down,
    lora_down_backward,
    lora_up,
    lora_up_backward,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS, HIDDEN, INTERMEDIATE, VOCABULARY = 8192, 4096, 14336, 128256
SECOND_PASSES = ("_sum_partials_kernel", "_sum_two_partials_kernel")
DTYPES = {"fp32": FP32, "fp16": FP16, "bf16": BF16}

COMMON = [
    (capability, "bf16", adapter, 16, 3277)
    for capability, adapter in ((80, "fp32"), (90, "bf16"), (90, "fp32"), (120, "bf16"))
]
ALL = [
    (capability, x, adapter, rank, threshold)
    for capability in sorted(GPU_LIMITS)
    for x, adapter in (
        ("bf16", "bf16"),
        ("bf16", "fp32"),
        ("fp16", "fp16"),
        ("fp16", "fp32"),
        ("fp32", "fp32"),
    )
    for rank in (16, 32, 64, 256)
    for threshold in (0, 3277)
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
    """Nothing here may touch the gigabytes that `torch.empty` only reserves."""
    assert not torch.are_deterministic_algorithms_enabled()
    yield


def lora_launches(
    capability: int, x_name: str, adapter_name: str, rank: int, threshold: int
) -> list[Launch]:
    x_dtype, adapter_dtype = DTYPES[x_name], DTYPES[adapter_name]
    x = torch.empty(TOKENS, HIDDEN, dtype=x_dtype)
    dy = torch.empty(TOKENS, INTERMEDIATE, dtype=x_dtype)
    a = torch.empty(rank, HIDDEN, dtype=adapter_dtype)
    b = torch.empty(INTERMEDIATE, rank, dtype=adapter_dtype)
    t = torch.empty(TOKENS, rank)
    options = dict(seed=torch.tensor(1), threshold=threshold, branch=0)
    with dry_run(capability) as launches:
        lora_down(x, a, 2.0, None, **options)
        lora_up(t, b, None, out_dtype=x_dtype)
        lora_up(t, b, None, out_dtype=x_dtype, addend=dy)
        lora_up_backward(dy, t, b, 2.0, None, need_d=True, need_db=True)
        lora_down_backward(t, a, x, **options, dx_dtype=x_dtype, need_dx=True, need_da=True)
    return launches


def wide_operand(launch: Launch) -> str:
    """The pointer to the [M, K] or [M, N] matrix that fixes the traffic of a LoRA kernel."""
    return next(name for name in ("x_ptr", "dy_ptr", "y_ptr") if name in launch.signature)


ELEMENT_SIZE = {"*bf16": 2, "*fp16": 2, "*fp32": 4}


def bytes_in_flight(launch: Launch) -> int:
    """What one multiprocessor has requested of the wide operand while it computes."""
    constants = launch.constants
    if "BLOCK_V" in constants:
        tile = constants["BLOCK_V"] * ELEMENT_SIZE[launch.signature["logits_ptr"]]
        return launch.resident_programs * (constants["STAGES"] - 1) * tile
    columns = constants.get("BLOCK_K") or constants["BLOCK_N"]
    tile = constants["BLOCK_M"] * columns * ELEMENT_SIZE[launch.signature[wide_operand(launch)]]
    return launch.resident_programs * (launch.num_stages - 1) * tile


def assert_fits(launch: Launch) -> None:
    assert not launch.resources.spills, launch
    assert launch.shared_bytes <= launch.limits.shared_bytes_per_block
    assert launch.resident_programs >= 1


def assert_lora_launch_is_sound(launch: Launch, capability: int) -> None:
    assert_fits(launch)
    instructions = launch.instructions
    if launch.kernel in SECOND_PASSES:
        assert count_global_loads(instructions, bits=128) > 0
        return
    types = {launch.signature[name] for name in launch.signature if name.endswith("_ptr")}
    wide = wide_operand(launch)
    # Aligned operands: the wide one must have been specialised and be moved 16 bytes at a time.
    assert wide in launch.divisible_by_16
    if wide == "y_ptr":
        assert count_global_stores(instructions, bits=128) > 0
        assert count_global_stores(instructions) == count_global_stores(instructions, bits=128)
    else:
        tile = launch.constants
        columns = tile.get("BLOCK_K") or tile["BLOCK_N"]
        bytes_of_tile = tile["BLOCK_M"] * columns * ELEMENT_SIZE[launch.signature[wide]]
        per_stage = bytes_of_tile // (32 * launch.num_warps * 16)
        assert count_global_loads(instructions, bits=128) >= per_stage
    # Only the scalar seed may be read by a narrow load.
    narrow = count_global_loads(instructions) - count_global_loads(instructions, bits=128)
    assert capability < 80 or narrow <= (1 if launch.constants.get("HAS_DROPOUT") else 0), (
        instructions
    )
    products = {"t_ptr", "b_ptr"} if wide == "y_ptr" else {wide, "a_ptr", "d_ptr", "b_ptr"}
    operands = {launch.signature[name] for name in products & launch.signature.keys()}
    if capability >= 80 and operands != {"*fp32"}:
        assert count_tensor_core(instructions) > 0, types
    # Multiply-adds at high rank are bound by arithmetic: 2 R operations per element of 4 bytes.
    arithmetic_bound = operands == {"*fp32"} and launch.constants["R"] > 16
    if capability >= 80 and wide != "y_ptr" and not arithmetic_bound:
        assert any(name.startswith(("LDGSTS", "UTMALDG")) for name in instructions)
        assert bytes_in_flight(launch) >= launch.limits.bytes_in_flight


@pytest.mark.parametrize(("capability", "x_name", "adapter_name", "rank", "threshold"), CASES)
def test_lora_launches(
    capability: int, x_name: str, adapter_name: str, rank: int, threshold: int
) -> None:
    launches = lora_launches(capability, x_name, adapter_name, rank, threshold)
    kernels = [launch.kernel for launch in launches if launch.kernel not in SECOND_PASSES]
    pair = ["_lora_up_backward_kernel"]
    if pair[0] not in kernels:
        assert rank > 16
        pair = ["_lora_down_kernel", "_lora_weight_grad_kernel"]
    assert kernels == [
        "_lora_down_kernel",
        "_lora_up_kernel",
        "_lora_up_kernel",  # with the output of an opaque base
        *pair,
        "_lora_up_kernel",
        "_lora_weight_grad_kernel",
    ]
    for launch in launches:
        assert_lora_launch_is_sound(launch, capability)


@pytest.mark.parametrize("capability", [75, 80, 90, 120])
def test_dora_launches(capability: int) -> None:
    """What DoRA adds: a scaled addend and the mask."""
    dtype = torch.float16 if capability == 75 else torch.bfloat16
    x = torch.empty(TOKENS, INTERMEDIATE, dtype=dtype)
    t, b, scale = torch.empty(TOKENS, 16), torch.empty(INTERMEDIATE, 16), torch.empty(INTERMEDIATE)
    with dry_run(capability) as launches:
        lora_up(t, b, None, out_dtype=dtype, addend=x, addend_scale=scale)
        drop(x, seed=torch.tensor(1), threshold=3277, branch=0)
    assert [launch.kernel for launch in launches] == ["_lora_up_kernel", "_drop_kernel"]
    for launch in launches:
        assert_fits(launch)
        assert count_global_loads(launch.instructions, bits=128) >= 1
        assert count_global_stores(launch.instructions, bits=128) >= 1


CROSS_ENTROPY_OPTIONS = {
    "plain": dict(softcap=0.0, label_smoothing=0.0, need_stats=False),
    "everything": dict(softcap=30.0, label_smoothing=0.1, need_stats=True),
}


@pytest.mark.parametrize("options", sorted(CROSS_ENTROPY_OPTIONS))
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "capability",
    [
        pytest.param(capability, marks=() if capability in (80, 90, 120) else pytest.mark.slow)
        for capability in sorted(GPU_LIMITS)
    ],
)
def test_cross_entropy_launch(capability: int, dtype: str, options: str) -> None:
    if capability < 80 and dtype == "bf16":
        dtype = "fp16"
    logits = torch.empty(1024, VOCABULARY, dtype=DTYPES[dtype])
    with dry_run(capability) as launches:
        cross_entropy_rows_(
            logits,
            torch.zeros(1024, dtype=torch.int64),
            ignore_index=-100,
            logit_scale=1.0,
            z_loss=0.0,
            need_grad=True,
            **CROSS_ENTROPY_OPTIONS[options],
        )
    (launch,) = launches
    assert launch.grid == (1024, 1, 1)
    assert_fits(launch)
    # The target and the logit at the target are scalars, as are the stores of the results.
    instructions = launch.instructions
    wide = count_global_loads(instructions, bits=128)
    assert wide >= 2 and count_global_loads(instructions) - wide <= 2
    wide = count_global_stores(instructions, bits=128)
    assert wide >= 2 and count_global_stores(instructions) - wide <= 6
    # The statistics with softcap are 60 operations and three special functions per logit: on a
    # B200, whose memory is four times as fast as an RTX 4090's, arithmetic binds them.
    if capability >= 80 and not (capability == 100 and options == "everything"):
        assert bytes_in_flight(launch) >= launch.limits.bytes_in_flight


def test_changing_row_counts_seeds_and_thresholds_compile_nothing_new() -> None:
    a = torch.empty(16, HIDDEN, dtype=BF16)
    with dry_run(90) as launches:
        for rows, seed, threshold, offset in (
            (TOKENS, 1, 3277, 0),
            (1, 2, 6554, 16),
            (4097, 3, 1, 2**33 + 1),
            (8191, 2**40, 65535, -1 % 2**40),
        ):
            lora_down(
                torch.empty(rows, HIDDEN, dtype=BF16),
                a,
                1.0,
                None,
                seed=torch.tensor(seed),
                threshold=threshold,
                branch=rows % 3,
                row_offset=offset,
            )
    down = [launch for launch in launches if launch.kernel == "_lora_down_kernel"]
    variants = {launch.cubin for launch in down}
    # With many rows t is written directly, with few rows partial sums are.
    assert len(down) == 4 and len(variants) <= 2


def test_unaligned_rows_compile_to_narrow_loads() -> None:
    with dry_run(90) as launches:
        lora_down(
            torch.empty(TOKENS, HIDDEN + 1, dtype=BF16)[:, 1:],
            torch.empty(16, HIDDEN, dtype=BF16),
            1.0,
            None,
            seed=None,
            threshold=0,
            branch=0,
        )
    assert "x_ptr" not in launches[0].divisible_by_16
    instructions = launches[0].instructions
    assert count_global_loads(instructions, bits=128) < count_global_loads(instructions)


def test_grids_cover_every_tile() -> None:
    for launch in lora_launches(90, "bf16", "bf16", 16, 3277):
        constants, grid = launch.constants, launch.grid
        if launch.kernel == "_lora_up_kernel":
            tiles = (TOKENS // constants["BLOCK_M"]) * {
                constants_n: constants_n // constants["BLOCK_N"]
                for constants_n in (HIDDEN, INTERMEDIATE)
            }[HIDDEN if constants["HAS_DROPOUT"] else INTERMEDIATE]
            assert grid == (tiles, 1, 1)
        elif launch.kernel == "_lora_down_kernel":
            assert grid[0] == TOKENS // constants["BLOCK_M"]
            assert 1 <= grid[1] <= 8
        # Every multiprocessor has work, but for the second pass over a weight gradient of 1 MB.
        if launch.kernel not in SECOND_PASSES:
            assert launch.programs >= launch.limits.multiprocessors


def test_too_much_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    import fasttune_kernels.lora_linear as module
    from fasttune_kernels.tables import Tile

    monkeypatch.setattr(module, "down_tile", lambda *_: Tile(128, 128, 8, 4))
    with dry_run(120), pytest.raises(OutOfResources, match="shared memory"):
        lora_down(
            torch.empty(TOKENS, HIDDEN, dtype=BF16),
            torch.empty(16, HIDDEN, dtype=BF16),
            1.0,
            None,
            seed=None,
            threshold=0,
            branch=0,
        )

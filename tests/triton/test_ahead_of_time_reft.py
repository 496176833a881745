"""What the launchers of reft would launch on every GPU generation, without a GPU."""

from __future__ import annotations

import pytest
import torch

from fasttune.ops import reft as hub
from fasttune.testing.triton_compile import (
    GPU_LIMITS,
    count_global_loads,
    count_global_stores,
    count_tensor_core,
)
from fasttune.testing.triton_dry_run import Launch, dry_run
from fasttune_kernels.reft import reft_backward, reft_forward

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS, HIDDEN = 8192, 4096
FEW = 112  # seven first and seven last tokens of eight sequences

COMMON = [(capability, "bf16", "fp32", 8, FEW) for capability in (80, 90, 120)]
ALL = [
    (capability, h, adapter, rank, entries)
    for capability in sorted(GPU_LIMITS)
    for h, adapter in (("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32"))
    for rank in (8, 32, 64, 128)
    for entries in (FEW, None)
    if capability >= 80 or "bf16" not in (h, adapter)
]
CASES = [
    pytest.param(
        *case, id="-".join(map(str, case)), marks=() if case in COMMON else pytest.mark.slow
    )
    for case in ALL
]


def launches_of(
    capability: int,
    h: str,
    adapter: str,
    rank: int,
    entries: int | None,
    threshold: int = 3277,
    activation: str = "gelu",
) -> list[Launch]:
    hidden = torch.empty(TOKENS, HIDDEN, dtype=DTYPES[h])
    rotation, source = (torch.empty(rank, HIDDEN, dtype=DTYPES[adapter]) for _ in range(2))
    rows = None if entries is None else torch.arange(entries)
    options = dict(
        difference=True, activation=activation, scale=1.0, seed=torch.tensor(1), threshold=threshold
    )
    with dry_run(capability) as launches:
        bias = torch.empty(rank, dtype=DTYPES[adapter])
        _, z, _ = reft_forward(hidden, rows, rotation, source, bias, **options, y=hidden)
        reft_backward(hidden, rows, rotation, source, z, **options, dh=hidden)
    return launches


@pytest.mark.parametrize(("capability", "h", "adapter", "rank", "entries"), CASES)
def test_launches(capability: int, h: str, adapter: str, rank: int, entries: int | None) -> None:
    launches = launches_of(capability, h, adapter, rank, entries)
    assert [launch.kernel for launch in launches] == [
        "_reft_forward_kernel",
        "_reft_backward_kernel",
    ]
    for launch in launches:
        assert not launch.resources.spills, launch
        assert launch.shared_bytes <= launch.limits.shared_bytes_per_block
        assert launch.resident_programs >= 1
        block_p = launch.constants["BLOCK_P"]
        assert launch.grid == (-(-(entries or TOKENS) // block_p), 1, 1)
        instructions = launch.instructions
        # The hidden states, R and W move 16 bytes a thread: seven eighths of all loads but the
        # numbers of the rows, the seed, the bias and, in the backward, z.
        wide = count_global_loads(instructions, bits=128)
        if capability >= 80:
            assert wide >= 7 * (count_global_loads(instructions) - 10) / 8, instructions
            assert count_global_stores(instructions, bits=128) >= 1
        if capability >= 80 and h != "fp32":
            assert count_tensor_core(instructions) > 0
        assert {"h_ptr", "dy_ptr"} & launch.divisible_by_16


def test_changing_lists_compile_nothing_new() -> None:
    with dry_run(90) as launches:
        for rows, entries in ((TOKENS, FEW), (1, 1), (4097, 7), (8191, 96)):
            h = torch.empty(rows, HIDDEN, dtype=torch.bfloat16)
            lines = torch.empty(4, HIDDEN)
            reft_forward(
                h, torch.arange(entries), lines, lines, None, difference=True,
                activation="identity", scale=1.0, seed=None, threshold=0, y=h,
            )  # fmt: skip
    assert len({launch.cubin for launch in launches}) == 1


def test_an_empty_list_launches_nothing() -> None:
    with dry_run(90) as launches:
        h, lines = torch.empty(8, 64), torch.empty(4, 64)
        x, z, d = reft_forward(
            h, torch.empty(0, dtype=torch.int64), lines, lines, None, difference=True,
            activation="silu", scale=1.0, seed=None, threshold=0, y=h,
        )  # fmt: skip
    assert not launches and x is not None and x.shape == (0, 64) and z.shape == d.shape == (0, 4)


def test_the_hub_refuses_ranks_that_the_tiles_do_not_cover() -> None:
    from fasttune import BackendError
    from fasttune.testing.conformance import backend

    lines = torch.randn(129, 256)
    with backend("triton"), pytest.raises(BackendError, match="ranks up to 128, got 129"):
        hub(torch.randn(3, 256), lines, lines)

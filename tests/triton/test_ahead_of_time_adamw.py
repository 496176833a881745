"""What the launchers of AdamW would launch on every GPU generation, compiled without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttune import use_backend
from fasttune.ops import _triton
from fasttune.optim import AdamW
from fasttune.testing.triton_compile import GPU_LIMITS, count_global_loads, count_global_stores
from fasttune.testing.triton_dry_run import Launch, dry_run
from fasttune_kernels.adamw import adamw_step, sum_of_squares
from fasttune_kernels.adamw_limit import limit_norms
from fasttune_kernels.adamw_tables import BLOCK, StepArguments

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}
COUNT, SHAPE = 420, (16, 576)  # the LoRA of SmolLM2-135M

FORMATS = [
    ("fp32", "fp32", "nearest", False),
    ("fp32", "8bit", "nearest", False),
    ("bf16", "fp32", "master", False),
    ("bf16", "bf16", "stochastic", True),
    ("bf16", "8bit", "kahan", False),
    ("fp16", "fp32", "kahan", True),
]
COMMON = [(90, *FORMATS[0]), (90, *FORMATS[2]), (90, *FORMATS[4]), (80, *FORMATS[0])]
CASES = [
    pytest.param(
        *case, id="-".join(map(str, case)), marks=() if case in COMMON else pytest.mark.slow
    )
    for case in ((capability, *form) for capability in sorted(GPU_LIMITS) for form in FORMATS)
    if case[0] >= 80 or case[1] != "bf16"
]


def launches_of(
    capability: int,
    dtype: str,
    moments: str,
    rounding: str,
    amsgrad: bool,
    *,
    offset: int = 0,
    limited: bool = False,
) -> list[Launch]:
    def make(kind: torch.dtype) -> list[Tensor]:
        flat = [torch.zeros(SHAPE[0] * SHAPE[1] + offset, dtype=kind) for _ in range(COUNT)]
        return [tensor[offset:].view(SHAPE) for tensor in flat]

    own, moment = DTYPES[dtype], MOMENTS[moments]
    residue = {"master": torch.int16, "kahan": own}.get(rounding)
    facts = torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 0.01, 1, i] for i in range(COUNT)]).double()
    scales = [torch.zeros(2, 36) for _ in range(COUNT)] if moments == "8bit" else []
    grads = make(own)
    none: list[Any] = []
    with dry_run(capability) as launches:
        squares = sum_of_squares(grads)
        residues = none if residue is None else make(residue)
        arguments = StepArguments(
            make(own), grads, make(moment), make(moment), make(moment) if amsgrad else none,
            residues, scales, facts, squares=squares, max_grad_norm=1.0, rounding=rounding,
        )  # fmt: skip
        norms = adamw_step(arguments)
        if limited:
            limits = torch.full((COUNT,), 1.0, dtype=torch.float64)
            limit_norms(arguments.params, residues, norms, limits, rounding)
    return launches


@pytest.mark.parametrize(("capability", "dtype", "moments", "rounding", "amsgrad"), CASES)
def test_two_launches_of_wide_accesses(
    capability: int, dtype: str, moments: str, rounding: str, amsgrad: bool
) -> None:
    launches = launches_of(capability, dtype, moments, rounding, amsgrad)
    assert [launch.kernel for launch in launches] == [
        "_sum_of_squares_kernel",
        "_adamw_step_kernel",
    ]
    for launch in launches:
        assert not launch.resources.spills, launch
        assert launch.shared_bytes <= launch.limits.shared_bytes_per_block
        assert launch.grid == (COUNT * 2, 1, 1)  # 9216 elements are two blocks
        assert SHAPE[0] * SHAPE[1] > BLOCK
    norm, step = (launch.instructions for launch in launches)
    assert count_global_loads(norm, bits=128) > 0
    # Operands of a full stretch: 16 bytes at a time, but for 8-bit codes, 8 of which are 8 bytes.
    wide = [DTYPES[dtype].itemsize] * 2 + [MOMENTS[moments].itemsize] * (2 + amsgrad)
    wide += [2] if rounding in ("master", "kahan") else []
    vectors = sum(size > 1 for size in wide)
    assert count_global_loads(step, bits=128) >= vectors
    assert count_global_stores(step, bits=128) >= vectors - 1  # all but the gradient
    in_flight = sum(wide) * 1024 * launches[1].resident_programs
    # A B200 would need 5 programs of 8-bit moments; registers leave room for 3.
    needed = launches[1].limits.bytes_in_flight
    assert in_flight >= (needed if capability != 100 or moments == dtype == "fp32" else 20 * 1024)


@pytest.mark.parametrize(("capability", "dtype", "moments", "rounding", "amsgrad"), CASES)
def test_limits_on_norms_are_one_launch_more(
    capability: int, dtype: str, moments: str, rounding: str, amsgrad: bool
) -> None:
    *_, launch = launches = launches_of(capability, dtype, moments, rounding, amsgrad, limited=True)
    assert len(launches) == 3 and launch.kernel == "_limit_norms_kernel"
    assert launch.grid == (COUNT * 2, 1, 1)
    assert not launch.resources.spills and launch.shared_bytes == 0
    operands = 2 if rounding in ("master", "kahan") else 1
    assert count_global_loads(launch.instructions, bits=128) >= operands
    assert count_global_stores(launch.instructions, bits=128) >= operands


def test_a_step_of_the_optimizer_is_three_launches_with_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_triton, "accepts_cpu_tensors", True)
    params = [nn.Parameter(torch.ones(SHAPE)) for _ in range(5)]
    for param in params:
        param.grad = torch.ones(SHAPE)
    optimizer = AdamW(params, max_grad_norm=1.0, max_norm=2.0)
    with dry_run(90) as launches, use_backend("triton"):
        optimizer.step()
    kernels = ["_sum_of_squares_kernel", "_adamw_step_kernel", "_limit_norms_kernel"]
    assert [launch.kernel for launch in launches] == kernels


def test_unaligned_tensors_compile_to_narrow_accesses() -> None:
    for launch in launches_of(90, "fp32", "fp32", "nearest", False, offset=1):
        assert count_global_loads(launch.instructions, bits=128) == 0
        assert not launch.resources.spills


def test_other_sizes_and_numbers_compile_nothing_new() -> None:
    with dry_run(90) as launches:
        for sizes in ((5,), (9000, 3), (100, 200, 70000)):
            sum_of_squares([torch.zeros(size) for size in sizes])
    assert len(launches) == 3 and len({launch.cubin for launch in launches}) == 1

"""What the launchers of the norms would launch on every GPU generation, compiled without a GPU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fasttune.testing.triton_compile import GPU_LIMITS, count_global_loads, count_global_stores
from fasttune.testing.triton_dry_run import Launch, dry_run
from fasttune_kernels import layer_norm, rms_norm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS = 8192
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
WIDTHS = (576, 1024, 4096, 16384)
NORMS = {"rms_norm": rms_norm, "layer_norm": layer_norm}

COMMON = [
    (capability, "bf16", width, name)
    for capability in (80, 90, 120)
    for width in (576, 4096)
    for name in NORMS
]
ALL = [
    (capability, dtype, width, name)
    for capability in sorted(GPU_LIMITS)
    for dtype in DTYPES
    for width in WIDTHS
    for name in NORMS
    if capability >= 80 or dtype != "bf16"
]
CASES = [
    pytest.param(
        *case, id="-".join(map(str, case)), marks=() if case in COMMON else pytest.mark.slow
    )
    for case in ALL
]


def launches_of(
    capability: int, dtype: torch.dtype, width: int, module: ModuleType, trained: bool
) -> list[Launch]:
    """Forward and backward; the gradient of the weight, too, if it is trained."""
    x, dy = (torch.empty(TOKENS, width, dtype=dtype) for _ in range(2))
    weight, rows = torch.empty(width, dtype=dtype), torch.empty(TOKENS)
    with dry_run(capability) as launches:
        if module is rms_norm:
            facts = {"eps": 1e-6, "weight_offset": 0.0}
            module.rms_norm_forward(x, weight, **facts, round_first=True, out_dtype=dtype)
            module.rms_norm_backward(
                dy, x, weight, rows, None, weight_offset=0.0, need_dx=True, need_dweight=trained
            )
        else:
            facts = {"eps": 1e-6, "weight_offset": 0.0}
            module.layer_norm_forward(x, weight, weight, **facts, out_dtype=dtype)
            module.layer_norm_backward(
                *(dy, x, weight, rows, rows, None),
                weight_offset=0.0,
                need_dx=True,
                need_dweight=trained,
                need_dbias=trained,
            )
    return launches


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(("capability", "dtype", "width", "name"), CASES)
def test_launches(capability: int, dtype: str, width: int, name: str, trained: bool) -> None:
    launches = launches_of(capability, DTYPES[dtype], width, NORMS[name], trained)
    # A frozen weight costs no launch: one kernel each way.
    assert len(launches) == 2 if not trained else len(launches) >= 3
    forward, backward = launches[:2]
    assert forward.kernel == f"_{name}_forward_kernel"
    for launch in launches:
        assert not launch.resources.spills, launch
        assert launch.shared_bytes <= launch.limits.shared_bytes_per_block
        assert launch.resident_programs >= 1
    # Every wide operand moves 16 bytes at a time.
    for launch, operands in ((forward, 1), (backward, 2)):
        assert count_global_loads(launch.instructions, bits=128) >= operands
        assert count_global_stores(launch.instructions, bits=128) >= 1
        assert launch.programs >= launch.limits.multiprocessors


def test_changing_row_counts_compile_nothing_new() -> None:
    weight = torch.empty(4096, dtype=BF16)
    with dry_run(90) as launches:
        for tokens in (1, 17, 4096, 8191):
            x = torch.empty(tokens, 4096, dtype=BF16)
            rms_norm.rms_norm_forward(
                x, weight, eps=1e-6, weight_offset=0.0, round_first=True, out_dtype=BF16
            )
    assert len({launch.cubin for launch in launches}) == 1

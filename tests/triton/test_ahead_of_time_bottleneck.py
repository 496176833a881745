"""What the launchers of a bottleneck adapter would launch on every GPU generation from sm_80 on,
compiled and read without a GPU, at Llama-3-8B's width on 8192 tokens.
"""

from __future__ import annotations

import pytest
import torch
from norm_launches import ELEMENT_SIZE, TOKENS, assert_fits

from fasttune.ops._bottleneck_triton import _fused
from fasttune.testing.triton_compile import (
    GPU_LIMITS,
    count_global_loads,
    count_global_stores,
    count_tensor_core,
)
from fasttune.testing.triton_dry_run import Launch, dry_run
from fasttune_kernels.bottleneck import bottleneck_backward, bottleneck_forward
from fasttune_kernels.tables import Gpu, assume_gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HIDDEN = 4096
THIN = ("_squeeze_kernel", "_weight_gradients_kernel")

# x, the adapter, the compute dtype: 16 bits throughout, and both kinds of autocast.
KINDS = {
    "bf16": (BF16, BF16, BF16),
    "fp16": (FP16, FP16, FP16),
    "fp32-adapter": (BF16, FP32, BF16),
    "autocast": (FP32, FP32, BF16),
}
CAPABILITIES = [capability for capability in sorted(GPU_LIMITS) if capability >= 80]
COMMON = [
    *((capability, "bf16", 64, "gelu", 6554) for capability in (80, 90, 120)),
    (90, "autocast", 64, "relu", 6554),
    (90, "fp32-adapter", 16, "silu", 0),
    (120, "bf16", 128, "identity", 6554),
]
ALL = [
    (capability, kind, width, activation, threshold)
    for capability in CAPABILITIES
    for kind in KINDS
    for width in (16, 32, 64, 128)
    for activation, threshold in (("relu", 0), ("gelu", 6554), ("relu", 6554), ("identity", 0))
]


def launches_of(
    capability: int, kind: str, width: int, activation: str, threshold: int, scaled: bool = False
) -> list[Launch]:
    of_x, of_adapter, dtype = KINDS[kind]
    # Parameters of another dtype are converted first for many rows.
    rows = TOKENS if of_adapter == dtype or width > 64 else 2048
    x = torch.empty(rows, HIDDEN, dtype=of_x)
    down = torch.empty(width, HIDDEN, dtype=of_adapter)
    up = torch.empty(HIDDEN, width, dtype=of_adapter)
    biases = torch.empty(width, dtype=of_adapter), torch.empty(HIDDEN, dtype=of_adapter)
    scale = torch.empty(HIDDEN, dtype=of_adapter) if scaled else None
    draw = {"seed": torch.tensor(1), "threshold": threshold}
    with dry_run(capability) as launches:
        y, z = bottleneck_forward(
            x, x, down, biases[0], up, biases[1], scale, 1.0, activation, **draw, dtype=dtype,
            out_dtype=torch.promote_types(of_x, dtype),
        )  # fmt: skip
        bottleneck_backward(
            y, x, z, down, up, scale, 1.0, activation, **draw, residual_is_x=True, outer_factor=1.0,
            outer_dtype=of_adapter, bias_dtypes=(of_adapter, of_adapter), needs=(True,) * 5,
        )  # fmt: skip
    return launches


@pytest.mark.parametrize(
    ("capability", "kind", "width", "activation", "threshold"),
    [
        pytest.param(
            *case, id="-".join(map(str, case)), marks=() if case in COMMON else pytest.mark.slow
        )
        for case in sorted({*ALL, *COMMON})
    ],
)
def test_launches(capability: int, kind: str, width: int, activation: str, threshold: int) -> None:
    launches = launches_of(capability, kind, width, activation, threshold)
    assert [launch.kernel for launch in launches] == [
        *("_squeeze_kernel", "_widen_kernel") * 2,
        "_weight_gradients_kernel",
        "_sum_group_partials_kernel",
    ]
    for launch in launches:
        assert_fits(launch)
    for launch in launches[:-1]:
        assert count_tensor_core(launch.instructions) > 0
        assert launch.programs >= launch.limits.multiprocessors
        # The wide operands are specialised as aligned and move 16 bytes at a time.
        names = {"x_ptr", "dy_ptr"} if launch.kernel in THIN else {"addend_ptr", "y_ptr"}
        wide = names & launch.signature.keys()
        assert wide <= launch.divisible_by_16, launch
        size = max(ELEMENT_SIZE[launch.signature[name]] for name in wide)
        tile = launch.constants["BLOCK_M"] * launch.constants["BLOCK_F"] * size
        each = max(tile // (16 * 32 * launch.num_warps), 1)
        assert count_global_loads(launch.instructions, bits=128) >= each, launch.instructions
        if launch.kernel == "_widen_kernel":
            assert count_global_stores(launch.instructions, bits=128) >= each, launch.instructions
            continue
        # Enough of it is asked for ahead of the products.
        in_flight = launch.resident_programs * (launch.num_stages - 1) * tile
        assert in_flight >= launch.limits.bytes_in_flight, launch


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("kind", ["bf16", "autocast"])
def test_a_trained_scale_fits_too(capability: int, kind: str) -> None:
    for launch in launches_of(capability, kind, 64, "gelu", 6554, scaled=True):
        assert_fits(launch)


def test_what_is_frozen_is_not_computed() -> None:
    x = torch.empty(TOKENS, HIDDEN, dtype=BF16)
    z = torch.empty(TOKENS, 64, dtype=BF16)
    down, up = torch.empty(64, HIDDEN, dtype=BF16), torch.empty(HIDDEN, 64, dtype=BF16)

    def kernels(activation: str, *needs: bool) -> list[tuple[str, int]]:
        with dry_run(90) as launches:
            bottleneck_backward(
                x, x, z, down, up, None, 1.0, activation, seed=None, threshold=0,
                residual_is_x=True, outer_factor=1.0, outer_dtype=BF16, bias_dtypes=(BF16, BF16),
                needs=needs,
            )  # fmt: skip
        return [(launch.kernel, launch.programs) for launch in launches]

    only_x = kernels("relu", True, False, False, False, False)
    assert [name for name, _ in only_x] == ["_squeeze_kernel", "_widen_kernel"]
    only_down = kernels("relu", False, True, True, False, False)
    # One program a block of rows: no column of dx.
    assert only_down[1] == ("_widen_kernel", TOKENS // 64)
    assert [name for name, _ in only_down[2:]] == [
        "_weight_gradients_kernel",
        "_sum_group_partials_kernel",
    ]
    only_up = kernels("identity", False, False, False, True, True)
    assert [name for name, _ in only_up] == [
        "_weight_gradients_kernel",
        "_sum_group_partials_kernel",
    ]
    assert kernels("relu", False, False, False, True, True)[0] == ("_widen_kernel", TOKENS // 64)
    assert kernels("relu", False, False, False, False, False) == []


def test_changing_row_counts_compile_nothing_new() -> None:
    down, up = torch.empty(36, 1024, dtype=BF16), torch.empty(1024, 36, dtype=BF16)
    with dry_run(90) as launches:
        for rows in (TOKENS, 1, 16, 4097):
            x = torch.empty(rows, 1024, dtype=BF16)
            y, z = bottleneck_forward(
                x, x, down, None, up, None, None, 1.0, "relu", seed=None, threshold=0, dtype=BF16,
                out_dtype=BF16,
            )  # fmt: skip
            bottleneck_backward(
                y, x, z, down, up, None, 1.0, "relu", seed=None, threshold=0, residual_is_x=True,
                outer_factor=1.0, outer_dtype=BF16, bias_dtypes=(BF16, BF16),
                needs=(True, False, False, False, False),
            )  # fmt: skip
    assert len(launches) == 16 and len({launch.cubin for launch in launches}) == 4


def test_fp32_weights_are_converted_first_where_that_is_less_work() -> None:
    def types(rows: int, width: int) -> set[str]:
        x = torch.empty(rows, 4096, dtype=BF16)
        down, up = torch.empty(width, 4096), torch.empty(4096, width)
        with dry_run(90) as launches:
            bottleneck_forward(
                x, x, down, None, up, None, None, 1.0, "relu", seed=None, threshold=0, dtype=BF16,
                out_dtype=BF16,
            )  # fmt: skip
        return {launch.signature["weight_ptr"] for launch in launches}

    assert types(2048, 64) == {"*fp32"}
    assert types(2048, 65) == types(4096, 64) == {"*bf16"}


def test_other_inputs_are_left_to_the_vendors_products() -> None:
    def fused(rows: int, features: int, width: int, dtype: torch.dtype) -> bool:
        x, down, up = (torch.empty(n, features) for n in (rows, width, width))
        return _fused(x, down, up.t(), dtype)

    assert fused(4, 64, 128, BF16) and fused(4, 64, 1, FP16)
    assert not fused(4, 64, 129, BF16) and not fused(4, 64, 8, FP32)
    for empty in ((0, 64, 8), (4, 0, 8), (4, 64, 0)):
        assert not fused(*empty, BF16)
    with assume_gpu(Gpu(75, 40)):
        assert not fused(4, 64, 8, FP16)

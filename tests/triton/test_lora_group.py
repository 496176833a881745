"""The kernels that take all branches of a group: as accurate and as sound as one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttune.testing.triton_compile import (
    GPU_LIMITS,
    count_global_loads,
    count_global_stores,
)
from fasttune.testing.triton_dry_run import dry_run
from fasttune.testing.triton_interpreter import interpreted
from fasttune_kernels import lora_group, lora_linear
from fasttune_kernels.tables import divide_up

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32)]
THRESHOLD = 3277
RANKS, WIDTHS = (16, 3, 8), (48, 130, 17)


class Group:
    """Operands of three projections of one x, no size a multiple of a tile."""

    def __init__(
        self,
        m: int,
        k: int,
        dtypes: tuple[torch.dtype, torch.dtype],
        threshold: int,
        ranks: Sequence[int] = RANKS,
        widths: Sequence[int] = WIDTHS,
    ) -> None:
        x_dtype, a_dtype = dtypes
        generator = torch.Generator().manual_seed(m)

        def randn(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.x = randn(m, k + 5, dtype=x_dtype)[:, :k]
        self.dys = [randn(m, n + 3, dtype=x_dtype)[:, 1 : n + 1] for n in widths]
        self.a = [randn(r, k, dtype=a_dtype) for r in ranks]
        self.b = [randn(n, r, dtype=a_dtype) for n, r in zip(widths, ranks, strict=True)]
        self.biases = [None, *(randn(n, dtype=x_dtype) for n in widths[1:])]
        self.ds = [randn(m, r) for r in ranks]
        count = len(ranks)
        self.scales = [(1.5, 0.5, 2.0)[j % 3] for j in range(count)]
        self.scale_tensors = [torch.tensor(0.75) if j % 3 == 1 else None for j in range(count)]
        self.draws = [
            lora_group.Draw(seed=torch.tensor(7 + j), threshold=threshold, branch=j)
            for j in range(len(ranks))
        ]

    def together(self) -> dict[str, Any]:
        down = lora_group.lora_down_group(
            self.x, self.a, self.scales, self.scale_tensors, self.draws, row_offset=2**33 + 7
        )
        up = lora_group.lora_up_group(self.ds, self.b, self.biases, out_dtype=self.x.dtype)
        pair = lora_group.lora_up_backward_group(
            self.dys, self.ds, self.b, self.scales, self.scale_tensors
        )
        last = lora_group.lora_down_backward_group(
            self.ds, self.a, self.x, self.draws,
            row_offset=2**33 + 7, dx_dtype=FP32, need_dx=True, need_da=True,
        )  # fmt: skip
        assert down is not None and up is not None and pair is not None and last is not None
        assert last[1] is not None
        return {"t": down, "y": up, "d": pair[0], "db": pair[1], "dx": [last[0]], "da": last[1]}

    def one_by_one(self) -> dict[str, Any]:
        scales = list(zip(self.scales, self.scale_tensors, strict=True))
        offset = {"row_offset": 2**33 + 7}
        facts = list(zip(self.a, scales, self.draws, strict=True))
        pairs = [
            lora_linear.lora_up_backward(dy, t, b, *scale, need_d=True, need_db=True)
            for dy, t, b, scale in zip(self.dys, self.ds, self.b, scales, strict=True)
        ]
        lasts = [
            lora_linear.lora_down_backward(
                d, a, self.x, **draw, **offset, dx_dtype=FP32, need_dx=True, need_da=True
            )
            for d, a, draw in zip(self.ds, self.a, self.draws, strict=True)
        ]
        return {
            "t": [lora_linear.lora_down(self.x, a, *s, **draw, **offset) for a, s, draw in facts],
            "y": [
                lora_linear.lora_up(t, b, bias, out_dtype=self.x.dtype)
                for t, b, bias in zip(self.ds, self.b, self.biases, strict=True)
            ],
            "d": [d for d, _ in pairs],
            "db": [db for _, db in pairs],
            "dx": [sum(dx.double() for dx, _ in lasts)],
            "da": [da for _, da in lasts],
        }


def assert_the_same(group: Group) -> None:
    """Up to the order of additions: those of one by one are compared with fp64 elsewhere."""
    with interpreted():
        ours, theirs = group.together(), group.one_by_one()
    for name, tensors in theirs.items():
        for mine, other in zip(ours[name], tensors, strict=True):
            assert mine.shape == other.shape
            assert mine.dtype == other.dtype or name == "dx"
            epsilon = torch.finfo(mine.dtype).eps
            allowed = 4 * epsilon * max(float(other.abs().max()), 1.0)
            assert float((mine.double() - other.double()).abs().max()) <= allowed, name


@pytest.mark.parametrize("threshold", [0, THRESHOLD])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(str(t)[6:] for t in pair))
def test_a_group_equals_its_branches(dtypes: tuple[torch.dtype, torch.dtype], threshold: int):
    assert_the_same(Group(70, 144, dtypes, threshold))


@pytest.mark.parametrize("ranks", [(16, 16), (32, 20)])
def test_two_branches_and_wider_ranks(ranks: tuple[int, ...]):
    assert_the_same(Group(33, 80, (BF16, FP32), THRESHOLD, ranks, (48, 40)))


def test_split_reductions():
    assert_the_same(Group(530, 72, (BF16, FP32), THRESHOLD, (8, 8), (300, 270)))
    assert_the_same(Group(20, 1100, (BF16, BF16), THRESHOLD, (8, 8), (40, 40)))


@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [
        ((16, 3, 8, 16), (2, 2)),
        ((16,) * 7, (2, 2, 3)),
        ((32, 20, 32), (1, 2)),
        ((8, 40, 8), (2, 1)),
    ],
)
def test_more_branches_than_a_kernel_takes(
    monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    """In packs, each of which reads x once; a branch that is left alone is one of `lora_linear`."""
    taken: dict[str, list[int]] = {}

    def counted(name: str, branches: int) -> Any:
        kernel = getattr(lora_group, name)

        def take(*args: Any) -> Any:
            taken.setdefault(name, []).append(len(args[branches]))
            return kernel(*args)

        return take

    for name, branches in (("_down", 1), ("_weight_grads", 1), ("_input_gradient", 0)):
        monkeypatch.setattr(lora_group, name, counted(name, branches))
    widths = tuple(40 + 8 * j for j in range(len(ranks)))
    assert_the_same(Group(33, 80, (BF16, FP32), THRESHOLD, ranks, widths))
    assert taken == {name: list(sizes) for name in ("_down", "_weight_grads", "_input_gradient")}


def test_branches_of_several_kinds_are_grouped_by_kind() -> None:
    given = Group(33, 80, (BF16, FP32), THRESHOLD, (16, 8, 16, 8), (40, 48, 56, 64))
    for j in (0, 3):
        given.draws[j]["threshold"] = 0
    assert_the_same(given)
    for j in (1, 2):
        given.a[j], given.b[j] = given.a[j].to(BF16), given.b[j].to(BF16)
    assert_the_same(given)


def test_what_does_not_fit_is_left_to_one_by_one():
    fits = Group(20, 64, (BF16, FP32), THRESHOLD, (16, 3), (48, 40))
    down = (fits.scales, fits.scale_tensors, fits.draws)
    wide = Group(20, 64, (BF16, FP32), THRESHOLD, (40, 40), (48, 40))
    uneven = [fits.draws[0], {**fits.draws[1], "threshold": 0}]
    mixed = [fits.a[0].to(BF16), fits.a[1]]
    with interpreted():
        assert lora_group.lora_down_group(fits.x, fits.a, *down) is not None
        assert lora_group.lora_down_group(fits.x, mixed, *down) is None
        assert lora_group.lora_down_group(fits.x[:0], fits.a, *down) is None
        assert lora_group.lora_down_group(fits.x, fits.a, *down[:2], uneven) is None
        assert (
            lora_group.lora_down_group(wide.x, wide.a, wide.scales, wide.scale_tensors, wide.draws)
            is None
        )


KERNELS = [
    "_lora_down_group_kernel",
    "_lora_up_group_kernel",
    "_lora_up_backward_group_kernel",
    "_lora_input_gradient_group_kernel",
    "_lora_weight_grad_group_kernel",
]
PAIRS = ((80, "fp32"), (90, "bf16"), (90, "fp32"), (120, "bf16"))
COMMON = [(capability, "bf16", a, 16, 3) for capability, a in PAIRS]
COMMON += [(90, "bf16", "fp32", 16, 4)]
ALL = [
    (capability, x, a, rank, branches)
    for capability in sorted(GPU_LIMITS)
    for x, a in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32"))
    for rank, branches in ((16, 2), (16, 3), (32, 2), (16, 4), (32, 6))
    if capability >= 80 or x != "bf16"
]
NAMED = {"bf16": BF16, "fp16": FP16, "fp32": FP32}


@pytest.mark.parametrize(
    ("capability", "x_name", "a_name", "rank", "branches"),
    [
        pytest.param(*c, id="-".join(map(str, c)), marks=() if c in COMMON else pytest.mark.slow)
        for c in ALL
    ],
)
def test_launches(capability: int, x_name: str, a_name: str, rank: int, branches: int) -> None:
    tokens, hidden = 8192, 4096
    widths = (hidden, 1024, 1024, hidden, 1024, 1024)[:branches]
    x_dtype, a_dtype = NAMED[x_name], NAMED[a_name]
    x = torch.empty(tokens, hidden, dtype=x_dtype)
    dys = [torch.empty(tokens, n, dtype=x_dtype) for n in widths]
    ts = [torch.empty(tokens, rank) for _ in widths]
    a = [torch.empty(rank, hidden, dtype=a_dtype) for _ in widths]
    b = [torch.empty(n, rank, dtype=a_dtype) for n in widths]
    scales, none = [2.0] * branches, [None] * branches
    draws = [
        lora_group.Draw(seed=torch.tensor(j), threshold=THRESHOLD, branch=0)
        for j in range(branches)
    ]
    with dry_run(capability) as launches:
        lora_group.lora_down_group(x, a, scales, none, draws)
        lora_group.lora_up_group(ts, b, none, out_dtype=x_dtype)
        lora_group.lora_up_backward_group(dys, ts, b, scales, none)
        lora_group.lora_down_backward_group(
            ts, a, x, draws, dx_dtype=x_dtype, need_dx=True, need_da=True
        )
    sums = [launch for launch in launches if "_sum" in launch.kernel]
    launched = [launch.kernel for launch in launches if launch not in sums]
    no_pair = x_name == "fp32" and rank > 16  # as for one branch
    packs = divide_up(branches, min(3, 64 // rank))
    expected = [name for name in KERNELS for _ in range(packs)]
    if no_pair:
        expected = [name for name in expected if name != KERNELS[2]]
        launched = [name for name in launched if "_group_" in name]
    assert launched == expected
    of_groups = [launch.kernel for launch in sums].count("_sum_group_partials_kernel")
    assert of_groups == packs * (1 if no_pair else 2)
    for launch in launches:
        assert not launch.resources.spills, launch
        assert launch.shared_bytes <= launch.limits.shared_bytes_per_block
        instructions = launch.instructions
        assert count_global_loads(instructions, bits=128) > 0
        if launch not in sums:
            assert count_global_stores(instructions) == count_global_stores(instructions, bits=128)

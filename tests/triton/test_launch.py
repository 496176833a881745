"""The launcher's own table of compiled kernels picks what Triton itself would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.compiler import CompiledKernel

from fasttune.testing.triton_dry_run import Launch, dry_run
from fasttune_kernels import launch as launching
from fasttune_kernels.launch import launch


@triton.jit(do_not_specialize=["N"])
def _scale_kernel(x_ptr, y_ptr, other_ptr, pair, scale, N, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bias_ptr, count = pair
    x = tl.load(x_ptr + i * stride, mask=i < N, other=0.0) * scale + tl.load(bias_ptr) * count
    if other_ptr is not None:
        x += tl.load(other_ptr + i, mask=i < N, other=0.0)
    tl.store(y_ptr + i, x, mask=i < N)


@triton.jit(do_not_specialize=["N"])
def _negate_kernel(x_ptr, y_ptr, other_ptr, pair, scale, N, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, -tl.load(x_ptr + i * stride, mask=i < N, other=0.0), mask=i < N)


MEMORY = torch.zeros(4096)
ALIGNED, ODD = MEMORY[:512], MEMORY[1025:1537]
CALLS: list[tuple[Any, ...]] = [
    (x, y, other, (bias, count), scale, n, stride)
    for x, y, bias in ((ALIGNED, ALIGNED, ALIGNED), (ODD, ALIGNED, ODD), (ALIGNED.half(), ODD, ODD))
    for other in (None, ALIGNED)
    for count, scale in ((1, 0.5), (True, 0.5), (16, 2.0), (7, 2.0), (2**40, 1.0))
    for n, stride in ((500, 1), (512, 16), (1, 3))
]


def facts(launch: Launch) -> tuple[Any, ...]:
    return launch.constants, launch.signature, launch.divisible_by_16, launch.grid, launch.cubin


def test_the_same_kernel_as_triton_is_launched() -> None:
    options = {"BLOCK": 128, "num_warps": 4}
    with dry_run(90) as launches:
        for call in CALLS:
            _scale_kernel[(4,)](*call, **options)
        expected = [facts(launch) for launch in launches]
        for _ in range(2):  # the second time from the table
            launches.clear()
            for call in CALLS:
                launch(_scale_kernel, (4,), *call, **options)
            assert [facts(launch) for launch in launches] == expected
    assert len({entry[-1] for entry in expected}) >= 6


def test_two_kernels_with_the_same_arguments_are_two() -> None:
    kernels = (_scale_kernel, _negate_kernel)
    with dry_run(90) as launches:
        for kernel in kernels:
            kernel[(4,)](*CALLS[0], BLOCK=128)
        for kernel in kernels:
            launch(kernel, (4,), *CALLS[0], BLOCK=128)
        first, second, *ours = map(facts, launches)
    assert ours == [first, second] and first[-1] != second[-1]


def test_triton_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    run = type(_scale_kernel).run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(_scale_kernel), "run", counted)
    monkeypatch.setattr(launching, "_compiled", {})
    with dry_run(90) as launches:
        for scale in (1.0, 2.0, 3.0):  # floats are no part of a kernel
            launch(_scale_kernel, (4,), *CALLS[0][:4], scale, 500, 1, BLOCK=128)
        assert (len(asked), len(launches)) == (1, 3)
        launch(_scale_kernel, (4,), *CALLS[0][:4], 1.0, 501, 1, BLOCK=128)
        launch(_scale_kernel, (4,), *CALLS[0][:4], 1.0, 501, 1, BLOCK=64)
    assert len(asked) == 3
    with dry_run(80):  # another device
        launch(_scale_kernel, (4,), *CALLS[0], BLOCK=128)
    assert len(asked) == 4


def test_the_table_does_not_grow_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "_MAX_ENTRIES", 3)
    with dry_run(90) as launches:
        for n in range(1, 9):
            launch(_scale_kernel, (4,), *CALLS[0][:5], n, 1, BLOCK=128)
            assert len(launching._compiled) <= 3
    assert len(launches) == 8


@pytest.mark.parametrize(
    "call",
    [
        {"args": CALLS[0][:-1], "BLOCK": 128, "stride": 1},
        {"args": CALLS[0]},
    ],
    ids=["by-name", "missing"],
)
def test_what_is_no_constant_is_refused(call: dict[str, Any]) -> None:
    with dry_run(90) as launches, pytest.raises(TypeError, match=r"launch: .*(stride|BLOCK)"):
        launch(_scale_kernel, (4,), *call.pop("args"), **call)
    assert not launches


def test_a_hook_on_launches_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler's: the table then leaves the launch to Triton."""
    by_triton = []
    original = CompiledKernel.__getitem__

    def counted(self: Any, grid: Any) -> Any:
        by_triton.append(grid)
        return original(self, grid)

    def hook(metadata: Any) -> None:
        pass

    monkeypatch.setattr(CompiledKernel, "__getitem__", counted)
    with dry_run(90) as launches:
        launch(_scale_kernel, (4,), *CALLS[0], BLOCK=128)
        by_triton.clear()
        launch(_scale_kernel, (4,), *CALLS[0], BLOCK=128)
        assert not by_triton
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            launch(_scale_kernel, (4,), *CALLS[0], BLOCK=128)
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
    assert len(by_triton) == 1 and len(launches) == 3

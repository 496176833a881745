"""Repeated code does what its function does, or is not repeated."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, fx

from fasttune import _registry
from fasttune.ops import LoraBranch, LoraProjection, _triton
from fasttune.ops.lora_linear import lora_linear_group
from fasttune.testing.cases import ALL
from fasttune.testing.conformance import Case, run_case
from fasttune.testing.triton_dry_run import Launch, dry_run
from fasttune.testing.triton_interpreter import interpreted
from fasttune_kernels import repeat
from fasttune_kernels.launch import launch
from fasttune_kernels.repeat import Repeated

OPS = ("lora_linear", "dora_linear", "lora_embedding", "rms_norm", "layer_norm", "glu", "rope")
OPS += ("scaled_glu", "bias_activation", "bottleneck", "ia3_scale")
CASES = [c for c in ALL if c.op in OPS[:3] and "triton" in c.backends]
CASES += [c for c in ALL if c.op in OPS[3:] and "triton" in c.backends][::4]

ON_THE_CPU_THEIR_PRODUCTS_READ_ADDRESSES = ("bottleneck-fp16",)


@pytest.fixture(autouse=True)
def repeats(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """CPU tensors are taken, and every repetition is noted."""
    monkeypatch.setattr(repeat, "takes_cpu_tensors", True)
    done: list[Any] = []
    original = Repeated._write_down

    def noted(self: Repeated, args: Any) -> tuple[Any, bool, Callable[..., Any] | None]:
        result, heard, code = original(self, args)

        def counted(*tensors: Tensor) -> Any:
            done.append(len(tensors))
            assert code is not None
            return code(*tensors)

        return result, heard, None if code is None else counted

    monkeypatch.setattr(Repeated, "_write_down", noted)
    return done


@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, pair, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z_ptr, factor = pair
    x = tl.load(x_ptr + i, mask=i < N, other=0.0) + tl.load(y_ptr + i, mask=i < N, other=0.0)
    tl.store(out_ptr + i, x + factor * tl.load(z_ptr), mask=i < N)


def add(x: Tensor, others: list[Tensor], factor: float) -> Tensor:
    """x + y + factor z, by a kernel and torch."""
    y, z = others
    out = torch.empty_like(x)
    blocks = -(-x.numel() // 16)
    launch(_add_kernel, (blocks,), x, y, out, (z, factor), x.numel(), BLOCK=16)
    return out.mul_(2).view(-1)


def arguments(n: int = 40, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    return torch.randn(n, dtype=dtype), [torch.randn(n, dtype=dtype), torch.randn((), dtype=dtype)]


def expected(x: Tensor, others: list[Tensor], factor: float) -> Tensor:
    return 2 * (x + others[0] + factor * others[1])


@pytest.fixture
def add_interpreted() -> Iterator[Repeated]:
    with interpreted(sys.modules[__name__]):
        yield Repeated(add)


def test_the_third_call_is_repeated_on_its_own_values(
    add_interpreted: Repeated, repeats: list[Any]
) -> None:
    for call in range(5):
        x, others = arguments()
        torch.testing.assert_close(add_interpreted(x, others, 0.5), expected(x, others, 0.5))
        assert len(repeats) == max(0, call - 1)


def test_a_tensor_that_was_passed_twice_need_not_be_again(
    add_interpreted: Repeated, repeats: list[Any]
) -> None:
    x, (_, z) = arguments()
    for _ in range(3):
        torch.testing.assert_close(add_interpreted(x, [x, z], 0.5), expected(x, [x, z], 0.5))
    x, others = arguments()
    torch.testing.assert_close(add_interpreted(x, others, 0.5), expected(x, others, 0.5))
    assert len(repeats) == 2


def misaligned(x: Tensor) -> Tensor:
    """The same values, not at a multiple of 16 bytes."""
    return torch.cat([x[:1], x])[1:]


@pytest.mark.parametrize(
    "change",
    [
        lambda x, others, factor: (x, others, 2 * factor),
        lambda x, others, factor: (x[:24], [others[0][:24], others[1]], factor),
        lambda x, others, factor: (x.double(), [y.double() for y in others], factor),
        lambda x, others, factor: (misaligned(x), [misaligned(others[0]), others[1]], factor),
        lambda x, others, factor: (x[::2], [others[0][::2], others[1]], factor),
    ],
    ids=["number", "shape", "dtype", "alignment", "strides"],
)
def test_other_facts_are_not_taken_for_the_same(
    change: Callable[..., Any], add_interpreted: Repeated, repeats: list[Any]
) -> None:
    for _ in range(3):
        x, others = arguments()
        add_interpreted(x, others, 0.5)
    done = len(repeats)
    changed = change(*arguments(), 0.5)
    found = add_interpreted(*changed)
    assert len(repeats) == done
    torch.testing.assert_close(found, add(*changed))


def reads_a_value(x: Tensor) -> Tensor:
    return x * x[0].item()


ELSEWHERE = torch.ones(4)


def takes_a_tensor_from_elsewhere(x: Tensor) -> Tensor:
    return x * ELSEWHERE


def decides_by_a_value(x: Tensor) -> Tensor:
    return x + 1 if x[0] > 0 else x - 1


def knows_an_address(x: Tensor) -> Tensor:
    return x + (x.data_ptr() % 2)


def is_shaped_by_values(x: Tensor) -> Tensor:
    return torch.ones(x[x > 0].numel())


def is_shaped_by_indices(x: Tensor) -> Tensor:
    return torch.ones(x.nonzero().shape[0]) + 0 * x.sum()


def is_shaped_by_classes(x: Tensor) -> Tensor:
    return torch.nn.functional.one_hot((x[:1] > 0).long()).float()


def is_shaped_by_a_listed_mask(x: Tensor) -> Tensor:
    return torch.ones(x[[x > 0]].numel())  # type: ignore[index]


def is_shaped_by_an_aten_function(x: Tensor) -> Tensor:
    return torch.ones(torch.ops.aten.nonzero.default(x).shape[0])


def casts_in_a_mode_of_its_own(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.mm(x[None], y[:, None]).float()


def asks_for_the_offset(x: Tensor) -> Tensor:
    return x + x.storage_offset()


def asks_for_the_default_dtype(x: Tensor) -> Tensor:
    return torch.ones(2, dtype=torch.get_default_dtype()) * x[:2]


def takes_an_attribute(x: Tensor) -> Tensor:
    return x.T + 1


def takes_a_number_of_numpy(x: Tensor) -> Tensor:
    return x * np.float64(2)


def slices_up_to_a_number_of_numpy(x: Tensor) -> Tensor:
    return x[: np.int64(2)]


def returns_no_tensor(x: Tensor) -> Any:
    return x.tolist()


@pytest.mark.parametrize(
    "function",
    [
        reads_a_value, takes_a_tensor_from_elsewhere, decides_by_a_value, knows_an_address,
        returns_no_tensor, is_shaped_by_values, is_shaped_by_indices, is_shaped_by_classes,
        is_shaped_by_a_listed_mask, is_shaped_by_an_aten_function, asks_for_the_offset,
        asks_for_the_default_dtype, takes_an_attribute, takes_a_number_of_numpy,
        slices_up_to_a_number_of_numpy,
    ],
)  # fmt: skip
def test_what_depends_on_values_runs_as_it_is(
    function: Callable[[Tensor], Any], repeats: list[Any]
) -> None:
    repeated = Repeated(function)
    for sign in (1, 1, 1, -1, 1):
        x = sign * torch.rand(4) + sign
        x[1:] = x[1:].clamp(min=0)
        found, true = repeated(x), function(x)
        assert found == true if isinstance(true, list) else torch.equal(found, true)
    assert not repeats


def test_a_mode_inside_is_not_lost() -> None:
    repeated = Repeated(casts_in_a_mode_of_its_own)
    for _ in range(4):
        x, y = torch.randn(4), torch.randn(4)
        assert torch.equal(repeated(x, y), casts_in_a_mode_of_its_own(x, y))


def test_zeros_of_two_signs_are_two(repeats: list[Any]) -> None:
    repeated = Repeated(lambda x, factor: x.mul(factor))
    for factor in (0.0, 0.0, 0.0, -0.0):
        found = repeated(torch.ones(2), factor)
        assert torch.equal(found.signbit(), torch.full((2,), str(factor) == "-0.0"))
    assert len(repeats) == 1


def test_what_nobody_hears_is_not_recorded(repeats: list[Any]) -> None:
    repeated = Repeated(lambda x: x.add_(1))
    with torch._C.DisableTorchFunction():
        for _ in range(4):
            x = torch.zeros(2)
            repeated(x)
            assert torch.equal(x, torch.ones(2))
    assert not repeats


def test_constants_are_the_same_to_the_last_bit(repeats: list[Any]) -> None:
    for constant in (float("inf"), -float("inf"), 1e-45, 0.1, 1 / 3):
        repeated = Repeated(lambda x, c: x.mul(c))
        for _ in range(3):
            assert torch.equal(repeated(torch.ones(2), constant), torch.ones(2) * constant)
    assert len(repeats) == 5


def test_other_kernels_are_not_taken_for_those_that_were_recorded(repeats: list[Any]) -> None:
    repeated = Repeated(add)
    with dry_run(90) as launches:
        for _ in range(3):
            repeated(*arguments(), 0.5)
        assert len(launches) == 3 and len(repeats) == 1
    with interpreted(sys.modules[__name__]):
        x, others = arguments()
        torch.testing.assert_close(repeated(x, others, 0.5), expected(x, others, 0.5))
    with dry_run(90) as launches:
        repeated(*arguments(), 0.5)
    assert len(launches) == 1 and len(repeats) == 1


def test_no_source_is_kept_by_torch(add_interpreted: Repeated) -> None:
    before = len(fx.graph_module._loader.eval_cache)
    for n in range(30, 40):
        for _ in range(3):
            add_interpreted(*arguments(n), 0.5)
    assert len(fx.graph_module._loader.eval_cache) == before


def test_every_launch_is_seen() -> None:
    """A launch past ``launch`` would be missing from what is repeated."""
    folder = Path(repeat.__file__).parent
    for path in folder.glob("*.py"):
        assert path.name == "launch.py" or not re.search(r"_kernel\s*\[", path.read_text()), path


def test_facts_may_be_read(repeats: list[Any]) -> None:
    def function(x: Tensor, scales: tuple[float, ...]) -> list[Any]:
        half = x.shape[0] // 2
        first, second = x.split([half, x.size(0) - half])
        out = x.new_empty(first.numel(), dtype=torch.float64).copy_(first.reshape(-1))
        return [out * scales[1], None, (second.t(), x), x.dtype == torch.float32]

    repeated = Repeated(function)
    for _ in range(4):
        x = torch.randn(6, 2)
        found, none, (second, same), is_fp32 = repeated(x, (1.0, 3.0))
        torch.testing.assert_close(found, 3.0 * x[:3].reshape(-1).double())
        assert none is None and torch.equal(second, x[3:].t()) and is_fp32 is True
        assert same.data_ptr() == x.data_ptr()
    assert len(repeats) == 2


def test_an_error_leaves_no_trace(repeats: list[Any]) -> None:
    failing = True

    def function(x: Tensor) -> Tensor:
        if failing:
            raise ValueError("once")
        return x + 1

    repeated = Repeated(function)
    for _ in range(3):
        with pytest.raises(ValueError, match="once"):
            repeated(torch.ones(2))
    failing = False
    for _ in range(3):
        assert torch.equal(repeated(torch.ones(2)), torch.full((2,), 2.0))
    assert repeats


def test_nothing_is_kept_alive(add_interpreted: Repeated) -> None:
    kept = []
    for _ in range(4):
        x, others = arguments()
        out = add_interpreted(x, others, 0.5)
        kept += [weakref.ref(t) for t in (x, *others, out)]
    del x, others, out
    assert all(known() is None for known in kept)


def test_the_tables_do_not_grow_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "_MOST_FACTS", 3)
    monkeypatch.setattr(repeat, "_MOST_CODE", 3)
    repeated = Repeated(lambda x: x.add(1))
    for n in range(1, 12):
        for _ in range(3):
            assert repeated(torch.ones(n)).shape == (n,)
        assert len(repeated._code) <= 3 and len(repeated._once) <= 3


def facts(found: Launch) -> tuple[Any, ...]:
    return found.kernel, found.grid, found.constants, found.signature, found.cubin


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("rank", [16, 64])
def test_the_launches_of_lora_are_the_same(
    count: int, rank: int, repeats: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_triton, "accepts_cpu_tensors", True)
    x = torch.randn(2, 8, 64, dtype=torch.bfloat16).requires_grad_()
    projections = [
        LoraProjection(
            torch.randn(128, 64, dtype=torch.bfloat16),
            branches=(
                LoraBranch(
                    torch.randn(rank, 64, requires_grad=True),
                    torch.randn(128, rank, requires_grad=True),
                    dropout_p=0.1,
                ),
            ),
        )
        for _ in range(count)
    ]
    steps = []
    with dry_run(90) as launches, _registry.use_backend("triton"):
        for _ in range(4):
            launches.clear()
            outputs = lora_linear_group(x, projections)
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
            steps.append([facts(found) for found in launches])
    assert len(repeats) == 4 and len(steps[0]) >= 4
    assert steps[1] == steps[0] and steps[2] == steps[0] and steps[3] == steps[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_repeated_case_matches_truth(case: Case, repeats: list[Any]) -> None:
    with interpreted():
        for _ in range(3):
            run_case(case, "triton")
    assert repeats or case.name in ON_THE_CPU_THEIR_PRODUCTS_READ_ADDRESSES

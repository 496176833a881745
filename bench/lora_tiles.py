"""Times candidate tiles of the LoRA kernels on this GPU: ``python bench/lora_tiles.py``.

The choice is made here, once, and written into ``fasttune_kernels.lora_tables``: choosing at run
time would change the order of sums between runs. Prints microseconds of every candidate and writes
bench/results/lora_tiles-<GPU>.json. Shapes of Llama-3-8B, 8192 rows, rank 16, bf16 with fp32
adapters; the L2 cache is flushed before each call, and the second pass of a split sum counts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from environment import RESULTS, environment, hardware, hardware_slug
from families import LLAMA3
from torch import Tensor

from fasttune_kernels import lora_group, lora_linear
from fasttune_kernels.tables import Tile

M, K, RANK = 8192, LLAMA3.hidden, 16
GROUPS = {"qkv": (K, LLAMA3.kv, LLAMA3.kv), "gate-up": (LLAMA3.intermediate,) * 2}
THRESHOLDS = {"dropout": 3277, "plain": 0}
REPEATS = 7
FLUSHED_BYTES = 100_000_000  # twice the L2 cache of an H100
QUEUE_CYCLES = 400_000  # the launches queue up behind a wait this long

DOWN = ((64, 64, 4, 4), (64, 32, 4, 4), (32, 64, 4, 4), (32, 64, 2, 4), (64, 64, 4, 3),
        (64, 64, 8, 4), (128, 64, 8, 3), (32, 128, 4, 3), (64, 128, 4, 3))  # fmt: skip
GRADIENT = ((32, 128, 4, 3), (32, 128, 4, 4), (32, 64, 4, 4), (64, 64, 4, 3), (64, 64, 4, 4),
            (64, 64, 8, 4), (64, 128, 4, 3), (64, 128, 8, 3))  # fmt: skip
UP = ((64, 128, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2), (32, 128, 4, 2), (32, 64, 4, 2),
      (128, 128, 8, 2))  # fmt: skip
PAIR = ((64, 128, 4, 3), (64, 128, 8, 3), (64, 256, 8, 3), (32, 128, 4, 4), (64, 64, 4, 4))


@dataclass(frozen=True)
class Case:
    """One call; ``table`` is the function of ``lora_tables`` that ``module`` asks for its tile."""

    name: str
    module: ModuleType
    table: str
    tiles: tuple[tuple[int, int, int, int], ...]
    call: Callable[[], object]


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, device="cuda") * 0.1).to(dtype)


def cases() -> Iterator[Case]:
    x = _random(M, K, dtype=torch.bfloat16)
    a, d = [_random(RANK, K) for _ in range(3)], [_random(M, RANK) for _ in range(3)]
    seeds = [torch.tensor(7 + j, device="cuda") for j in range(3)]
    for group, widths in GROUPS.items():
        n = len(widths)
        b = [_random(width, RANK) for width in widths]
        dy = [_random(M, width, dtype=torch.bfloat16) for width in widths]
        scales, ones, biases = [2.0] * n, [None] * n, [None] * n
        for kind, threshold in THRESHOLDS.items():
            draws = [{"seed": seeds[j], "threshold": threshold, "branch": j} for j in range(n)]

            def backward(dx: bool, n: int = n, draws: Any = draws) -> Callable[[], object]:
                return lambda: lora_group.lora_down_backward_group(
                    d[:n], a[:n], x, draws, dx_dtype=x.dtype, need_dx=dx, need_da=not dx
                )

            def down(n: int = n, draws: Any = draws, scales: Any = scales, ones: Any = ones) -> Any:
                return lora_group.lora_down_group(x, a[:n], scales, ones, draws)

            name = f"{group}, {kind}"
            yield Case(f"down, {name}", lora_group, "group_down_tile", DOWN, down)
            yield Case(
                f"input gradient, {name}", lora_group, "group_input_gradient_tile", UP,
                backward(True),
            )  # fmt: skip
            yield Case(
                f"weight gradient, {name}", lora_group, "group_weight_grad_tile", GRADIENT,
                backward(False),
            )  # fmt: skip

        def up(b: Any = b, n: int = n, biases: Any = biases) -> Any:
            return lora_group.lora_up_group(d[:n], b, biases, out_dtype=x.dtype)

        def pair(b: Any = b, n: int = n, dy: Any = dy, scales: Any = scales, ones: Any = ones):
            return lora_group.lora_up_backward_group(dy, d[:n], b, scales, ones)

        yield Case(f"up, {group}", lora_group, "up_tile", UP, up)
        yield Case(f"up backward, {group}", lora_group, "group_pair_tile", PAIR, pair)
    b1 = _random(K, RANK)
    for kind, threshold in THRESHOLDS.items():
        bits = {"seed": seeds[0], "threshold": threshold, "branch": 0}

        def one_down(bits: Any = bits) -> Any:
            return lora_linear.lora_down(x, a[0], 2.0, None, **bits)

        def one_gradient(bits: Any = bits, dx: bool = False) -> Any:
            return lora_linear.lora_down_backward(
                d[0], a[0], x, **bits, dx_dtype=x.dtype, need_dx=dx, need_da=not dx
            )

        yield Case(f"down, one, {kind}", lora_linear, "down_tile", DOWN, one_down)
        yield Case(
            f"weight gradient, one, {kind}", lora_linear, "weight_grad_tile", GRADIENT, one_gradient
        )
        yield Case(
            f"input gradient, one, {kind}", lora_linear, "up_tile", UP,
            lambda bits=bits: one_gradient(bits, dx=True),
        )  # fmt: skip
    yield Case(
        "up, one", lora_linear, "up_tile", UP,
        lambda: lora_linear.lora_up(d[0], b1, None, out_dtype=x.dtype),
    )  # fmt: skip


def microseconds(call: Callable[[], object], flushed: Tensor) -> float:
    """Median of the time between two events around a call."""
    times = []
    for _ in range(REPEATS):
        flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("lora_tiles: no CUDA device")
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    found: dict[str, dict[str, float]] = {}
    for case in cases():
        own: dict[str, float] = {}
        for tile in case.tiles:
            with mock.patch.object(case.module, case.table, lambda *_, tile=tile: Tile(*tile)):
                for _ in range(3):
                    case.call()
                own[str(astuple(Tile(*tile)))] = microseconds(case.call, flushed)
        found[case.name] = dict(sorted(own.items(), key=lambda item: item[1]))
        best = ", ".join(f"{tile} {us:.0f}" for tile, us in [*found[case.name].items()][:4])
        print(f"{case.name:36s} {best}", flush=True)
    path = RESULTS / f"lora_tiles-{hardware_slug(hardware())}.json"
    facts = {"environment": environment("python bench/lora_tiles.py"), "us": found}
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()

"""Pure decisions of a run: who works when, and how many steps fit into the time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from fasttune.demo.options import DEFAULT_STEPS, MIN_STEPS, DemoOptions

BLOCK_STEPS = 5
WARMUP_SHARE = 0.1

T = TypeVar("T")


def block_steps(steps: int) -> int:
    """Steps per turn: few enough for at least two turns each."""
    return max(1, min(BLOCK_STEPS, steps // 2))


def turns(steps: int) -> list[tuple[str, int]]:
    """Who does how many steps, in order: patched, stock, stock, patched, and so on.

    The mirrored order cancels a slow drift of the machine's speed.
    """
    block = block_steps(steps)
    order: list[tuple[str, int]] = []
    for index, start in enumerate(range(0, steps, block)):
        pair = ("patched", "stock") if index % 2 == 0 else ("stock", "patched")
        order.extend((name, min(block, steps - start)) for name in pair)
    return order


def affordable_steps(options: DemoOptions, pair_s: float, left_s: float) -> int:
    """Steps that fit into ``left_s`` seconds if one step of both workers takes ``pair_s``.

    A number of steps that the user asked for is never reduced.
    """
    if options.steps is not None:
        return options.steps
    fitting = math.floor(left_s / pair_s) if pair_s > 0 else DEFAULT_STEPS
    return max(MIN_STEPS, min(DEFAULT_STEPS, fitting))


def warmup_steps(steps: int) -> int:
    """Steps of linear warm-up; none for a single step, whose learning rate would be 0."""
    return min(steps - 1, max(1, round(WARMUP_SHARE * steps)))


def grouped(items: Sequence[T], size: int) -> list[list[T]]:
    """Consecutive groups of ``size``, the last one possibly shorter."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]

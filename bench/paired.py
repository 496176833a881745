"""Times two variants of the same work, alternated in one process, and compares them pair by pair.

A shared machine drifts: frequency, neighbours, page cache. Two runs next to each other see nearly
the same machine, so the ratio within a pair is steadier than either time. Each pair runs both
variants once, in an order drawn from a seeded, balanced shuffle, and the result is the median of
the paired ratios with a bootstrap interval.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

MIN_PAIRS = 20
MAX_PAIRS = 200
BUDGET_S = 4.0  # short steps get more pairs than MIN_PAIRS until this is spent
QUICK_PAIRS = 5
WARMUP_RUNS = 3
BOOTSTRAP_RESAMPLES = 5000
SEED = 20240229


@dataclass(frozen=True)
class PairedTimes:
    """Medians over the pairs; ``ratio`` is stock over fasttune, so above 1 fasttune is faster."""

    pairs: int
    stock_ms: float
    fasttune_ms: float
    ratio: float
    ratio_low: float  # 95 % bootstrap interval of the median ratio
    ratio_high: float


def balanced_order(pairs: int, seed: int = SEED) -> list[bool]:
    """Whether stock runs first, for each pair: half of them, shuffled."""
    order = [index % 2 == 0 for index in range(pairs)]
    random.Random(seed).shuffle(order)
    return order


def median_interval(values: Sequence[float], seed: int = SEED) -> tuple[float, float]:
    """95 % bootstrap percentile interval of the median."""
    sample = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(sample), (BOOTSTRAP_RESAMPLES, len(sample)))
    low, high = np.percentile(np.median(sample[draws], axis=1), (2.5, 97.5))
    return float(low), float(high)


def summarise(stock_s: Sequence[float], fasttune_s: Sequence[float]) -> PairedTimes:
    """Medians and the interval; element i of both is pair i. Times in seconds.

    Raises ValueError if the two do not have the same, positive number of times.
    """
    if not stock_s or len(stock_s) != len(fasttune_s):
        raise ValueError(f"expected paired times, got {len(stock_s)} and {len(fasttune_s)}")
    ratios = [stock / fasttune for stock, fasttune in zip(stock_s, fasttune_s, strict=True)]
    low, high = median_interval(ratios)
    return PairedTimes(
        pairs=len(ratios),
        stock_ms=float(np.median(stock_s)) * 1e3,
        fasttune_ms=float(np.median(fasttune_s)) * 1e3,
        ratio=float(np.median(ratios)),
        ratio_low=low,
        ratio_high=high,
    )


def timed(step: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def warm_up(stock: Callable[[], object], fasttune: Callable[[], object]) -> float:
    """Runs both a few times; seconds of one pair once warm."""
    pair_s = 0.0
    for _ in range(WARMUP_RUNS):
        pair_s = timed(stock) + timed(fasttune)
    return pair_s


def number_of_pairs(pair_s: float, *, quick: bool) -> int:
    """How many pairs of ``pair_s`` seconds each to run."""
    if quick:
        return QUICK_PAIRS
    return max(MIN_PAIRS, min(MAX_PAIRS, int(BUDGET_S / max(pair_s, 1e-9))))


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection inside a timed step: it would hit one of the two at random."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()

from __future__ import annotations

import time

import pytest
import torch

from fasttune.memory import HighWaterMeter, MemoryMeter, SampledMeter, memory_meter

MIB = 2**20
BLOCK_MIB = 128


def meters() -> list[type[HighWaterMeter] | type[SampledMeter]]:
    return [SampledMeter, *([HighWaterMeter] if HighWaterMeter.available() else [])]


def touch(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB // 4)


@pytest.mark.parametrize("kind", meters())
def test_peak_of_a_block_is_seen_after_it_is_freed(
    kind: type[HighWaterMeter] | type[SampledMeter],
) -> None:
    meter: MemoryMeter = kind()
    meter.set_baseline()
    meter.start_block()
    block = touch(BLOCK_MIB)
    time.sleep(0.1)  # long enough to be sampled
    del block
    assert 0.9 * BLOCK_MIB <= meter.end_block() / MIB <= 1.5 * BLOCK_MIB


@pytest.mark.parametrize("kind", meters())
def test_peak_is_forgotten_by_the_next_block(
    kind: type[HighWaterMeter] | type[SampledMeter],
) -> None:
    meter: MemoryMeter = kind()
    meter.set_baseline()
    meter.start_block()
    block = touch(BLOCK_MIB)
    time.sleep(0.1)
    del block
    meter.end_block()
    meter.start_block()
    assert meter.end_block() / MIB < 0.5 * BLOCK_MIB


@pytest.mark.parametrize("kind", meters())
def test_what_is_loaded_before_the_baseline_does_not_count(
    kind: type[HighWaterMeter] | type[SampledMeter],
) -> None:
    weights = touch(BLOCK_MIB)
    meter: MemoryMeter = kind()
    meter.set_baseline()
    meter.start_block()
    assert meter.end_block() / MIB < 0.5 * BLOCK_MIB
    del weights


def test_the_method_is_named() -> None:
    assert memory_meter("cpu").method

"""Tiles of the norms by row length. See `tables` for why a table."""

from __future__ import annotations

import functools

from .tables import MAX_REGISTERS, Gpu, Tile, divide_up, next_power_of_2

MAX_FEATURES = 16384  # a longer row does not fit the registers of one program
_MAX_SUMMED_FEATURES = 8192  # nor does this one beside a sum for every feature

# Shared memory that the loads of one step may take with three and with two stages: two programs fit
# a multiprocessor of an A100, H100 or B200, one those with 99 KB.
_THREE_STAGES = 24 * 1024
_TWO_STAGES = 48 * 1024


@functools.cache
def row_tile(features: int) -> Tile:
    """Whole rows: as many short ones as give a thread 32 values, one long one."""
    columns = next_power_of_2(features)
    rows = min(max(4096 // columns, 1), 32) if columns <= 1024 else 1
    warps = max(columns // 1024, 4)
    return Tile(rows, columns, warps, 1)


@functools.cache
def gradient_tile(features: int) -> Tile:
    """As `row_tile`, for twice the operands."""
    tile = row_tile(features)
    return Tile(tile.rows, tile.columns, max(tile.columns // 512, 4), 1)


@functools.cache
def sums_tile(capability: int, features: int, bytes_per_element: int) -> Tile | None:
    """As `row_tile`, for persistent programs that also keep a sum for every feature, or None.

    `bytes_per_element` is that of all operands together.
    """
    if features > _MAX_SUMMED_FEATURES:
        return None
    tile = gradient_tile(features)
    step = tile.rows * tile.columns * bytes_per_element
    stages = 3 if step <= _THREE_STAGES else 2 if step <= _TWO_STAGES else 1
    # Without asynchronous copies more stages only cost registers.
    return Tile(tile.rows, tile.columns, tile.warps, stages if capability >= 80 else 1)


def persistent_programs(gpu: Gpu, rows: int, tile: Tile) -> int:
    """Two programs a multiprocessor, each with an equal share of the row blocks."""
    return min(2 * gpu.multiprocessors, divide_up(rows, tile.rows))


def register_limit(tile: Tile) -> int:
    """Registers a thread, so that a multiprocessor (65536 of them) holds at least one program."""
    return min(MAX_REGISTERS, 65536 // (32 * tile.warps))

"""Tiles of the bottleneck kernels by GPU, dtypes and width. See `tables` for why a table."""

from __future__ import annotations

import functools

import torch

from .lora_tables import for_bandwidth, splits_of
from .tables import Gpu, Tile, divide_up

# The tiles for operands of 16 bits are the best of five to nine on an H200 with 8192 rows and 4096
# features, with and without dropout.


@functools.cache
def squeeze_tile(capability: int, x: torch.dtype, weight: torch.dtype, block_r: int) -> Tile:
    """[rows of x, features per step]."""
    if 4 in (x.itemsize, weight.itemsize):
        return for_bandwidth(capability, Tile(64, 32, 4, 4), more=1)
    return Tile(64, 64, 4, 4 if block_r <= 64 else 3)


@functools.cache
def widen_tile(y: torch.dtype, weight: torch.dtype, block_r: int) -> Tile:
    """[rows, columns per step]; the whole width is in one program."""
    columns = 32 if 4 in (y.itemsize, weight.itemsize) else 64
    return Tile(64 if block_r <= 64 else 32, columns, 4, 3)


@functools.cache
def outer_tile(wide: torch.dtype, block_r: int) -> Tile:
    """[rows per step, features of the outputs]."""
    warps = 4 if block_r <= 64 else 8  # four spill on sm_120
    return Tile(64, 64, warps, 3 if wide.itemsize == 4 else 4)


def column_groups(gpu: Gpu, features: int, row_blocks: int, tile: Tile) -> tuple[int, int]:
    """How many programs share the columns of a block of rows, and the columns of each."""
    if features == 0:
        return 1, tile.columns
    most = divide_up(features, tile.columns)
    return splits_of(gpu, features, row_blocks, tile.columns, most=most, least=tile.columns)

"""Tiles of the LoRA kernels by GPU, arithmetic, rank and dropout. See `tables` for why a table."""

from __future__ import annotations

import functools

import torch

from .tables import Gpu, Tile, divide_up, next_power_of_2

# Ranks above this are cut into chunks: a wider tile spills or exceeds 99 KB of shared memory.
MAX_BLOCK_R = 128


def rank_block(rank: int) -> int:
    """The block that holds a rank; 16 is the least that a tensor-core product takes on an axis."""
    return min(max(next_power_of_2(rank), 16), MAX_BLOCK_R)


# How `dot_exact` computes a product:
#   "mma"    both operands of one 16-bit dtype, tensor cores
#   "terms"  bf16 with fp32, the fp32 operand as three bf16 terms, tensor cores
#   "terms6" fp16 with fp32, two by three bf16 terms, tensor cores
#   "split"  fp32 with fp32 for a result of 16 bits, six products of bf16 terms, tensor cores
#   "fma"    fp32 multiply-adds


def has_tensor_cores(gpu: Gpu) -> bool:
    """Whether Triton uses them: on sm_75 it has none for bf16, and multiplies fp16 without them."""
    return gpu.capability >= 80


@functools.cache
def arithmetic_of(
    gpu: Gpu, lhs: torch.dtype, rhs: torch.dtype, result: torch.dtype = torch.float32
) -> str:
    if not has_tensor_cores(gpu):
        return "fma"
    if lhs == rhs:
        if lhs != torch.float32:
            return "mma"
        return "fma" if result == torch.float32 else "split"
    if torch.float32 not in (lhs, rhs):
        return "fma"
    return "terms" if torch.bfloat16 in (lhs, rhs) else "terms6"


# One set of tiles fits every GPU from sm_80 to sm_120 (99 KB of shared memory). A B200 moves 43 KB
# per multiprocessor and round trip, more than twice an H100: it takes more stages and, for 128
# ranks, whose fp32 operand is most of a stage (16 KB), a wider tile. sm_75 has no asynchronous
# copies and 64 KB.


def _is_b200(capability: int) -> bool:
    return capability in (100, 103)


def for_bandwidth(capability: int, tile: Tile, more: int = 3) -> Tile:
    stages = tile.stages + (more if _is_b200(capability) else 0)
    return Tile(tile.rows, tile.columns, tile.warps, stages)


@functools.cache
def down_tile(capability: int, arithmetic: str, block_r: int, dropout: bool) -> Tile:
    """[rows of x, features per step]."""
    return for_bandwidth(capability, _down_tile(capability, arithmetic, block_r, dropout))


def _down_tile(capability: int, arithmetic: str, block_r: int, dropout: bool) -> Tile:
    if arithmetic == "mma":
        return Tile(64, 64, 4, 4) if block_r <= 64 else Tile(128, 64, 8, 3)
    if arithmetic == "fma":
        if block_r in (32, 64):
            return Tile(32, 32, 4, 3)
        return Tile(64, 32, 4 if block_r == 16 else 8, 3)
    if block_r == 16 or (block_r == 32 and arithmetic == "terms"):
        return Tile(64, 64, 4, 4)
    if block_r == 128 and _is_b200(capability):
        return Tile(128, 32, 8, 4)
    if capability >= 120 and arithmetic == "terms6" and block_r == 64 and dropout:
        return Tile(32, 32, 4, 4)  # 64 rows spill 16 bytes there
    few_warps = block_r == (64 if arithmetic == "terms" else 32)
    if few_warps:
        return Tile(64, 32, 4, 4)
    # An H100 holds one such program per multiprocessor: 20 KB in flight, 18 needed.
    return Tile(64, 32, 8, 6 if capability == 90 else 4)


@functools.cache
def up_tile(capability: int, arithmetic: str, block_r: int, dropout: bool) -> Tile:
    """[rows, columns of the output]."""
    if arithmetic == "fma":
        return Tile(32, 64, 4, 2)
    if arithmetic == "split":
        return Tile(64, 64 if dropout else 128, 4, 2)  # measured, as the groups' below
    return Tile(64, 128, 8 if arithmetic == "terms6" else 4, 2)


@functools.cache
def up_block_r(arithmetic: str, block_r: int) -> int:
    """The step through the rank: both operands of a step and their terms sit in registers."""
    return min(block_r, 16 if arithmetic in ("fma", "split") else 32)


@functools.cache
def weight_grad_tile(capability: int, arithmetic: str, block_r: int, dropout: bool) -> Tile:
    """[rows per step, features of the output]."""
    tile = _weight_grad_tile(capability, arithmetic, block_r, dropout)
    return for_bandwidth(capability, tile, more=4)


def _weight_grad_tile(capability: int, arithmetic: str, block_r: int, dropout: bool) -> Tile:
    if arithmetic == "fma":
        if block_r <= 32:
            return Tile(32, 64, 4, 3)
        return Tile(16, 64, 4 if block_r == 64 else 8, 4)
    if block_r >= 64:
        if capability == 90:  # as in `_down_tile`: 24 KB in flight
            return Tile(32, 128, 8, 4)
        narrow = arithmetic == "terms6" and not (block_r == 128 and _is_b200(capability))
        return Tile(32, 64, 8, 4) if narrow else Tile(32, 128, 8, 3)
    # 64 rows spill where masks or terms take registers too.
    crowded = block_r == 32 and (arithmetic == "terms6" or (arithmetic == "terms" and dropout))
    return Tile(32, 128, 4, 4) if crowded else Tile(64, 128, 4, 3)


@functools.cache
def pair_tile(capability: int, arithmetic: str, block_r: int) -> Tile | None:
    """[rows per step, columns], or None where two products are better.

    Above rank 32 the partial sums cost as much traffic as a second read of dY. fp32 multiply-adds
    at ranks 17 to 32 have no tile without spills that is wide enough for the partial sums to pay.
    """
    if block_r > 32:
        return None
    if arithmetic == "fma":
        return for_bandwidth(capability, Tile(32, 64, 4, 3)) if block_r <= 16 else None
    if arithmetic == "terms6":
        return for_bandwidth(capability, Tile(32, 64, 4, 4))
    if block_r <= 16:
        return Tile(64, 256, 8, 3) if arithmetic == "mma" else Tile(64, 128, 4, 3)
    if arithmetic == "mma":
        tile = Tile(32, 256, 8, 3)
    else:  # 64 rows spill 48 bytes on an H100
        tile = Tile(32, 128, 8, 5) if capability == 90 else Tile(64, 128, 8, 3)
    return for_bandwidth(capability, tile, more=1)


# Groups: a program holds the accumulators and masks of all branches at once. Beyond these limits it
# would spill, and more branches are taken in packs. The tiles for "terms" and "split" are the best
# of six to nine on an H100 with 8192 rows, 4096 features and rank 16 (bench/results/lora_tiles-*):
# two programs of four warps a multiprocessor beat one of eight by up to a half.
GROUP_BRANCHES, GROUP_RANKS = 3, 64


@functools.cache
def group_down_tile(capability: int, arithmetic: str, dropout: bool) -> Tile:
    """[rows of x, features per step]."""
    if arithmetic == "mma":
        return for_bandwidth(capability, Tile(32, 64, 4, 4))
    if arithmetic == "terms":
        return for_bandwidth(capability, Tile(64, 32 if dropout else 64, 4, 4))
    tile = Tile(32, 32, 4, 4) if arithmetic == "fma" else Tile(64, 64, 8, 4)
    return for_bandwidth(capability, tile)


@functools.cache
def group_weight_grad_tile(capability: int, arithmetic: str, dropout: bool) -> Tile:
    """[rows per step, features of the outputs]."""
    if arithmetic == "terms" and not dropout and capability == 90:
        return Tile(32, 128, 4, 3)  # spills elsewhere, and gains nothing with dropout
    return for_bandwidth(capability, Tile(32, 64, 8 if arithmetic == "fma" else 4, 4))


@functools.cache
def group_pair_tile(capability: int, arithmetic: str, block_r: int) -> Tile | None:
    """[rows per step, columns], or None as in `pair_tile`."""
    if block_r > 16 and arithmetic == "terms":
        return Tile(32, 128, 8, 3)  # the body is repeated: 64 rows spill
    return pair_tile(capability, arithmetic, block_r)


@functools.cache
def group_input_gradient_tile(
    capability: int, arithmetic: str, block_r: int, dropout: bool
) -> Tile:
    """[rows, features of the output]."""
    if arithmetic == "split":
        rows = 32 if dropout and capability >= 120 else 64  # 64 rows spill 16 bytes there
        return Tile(rows, 64 if dropout else 128, 4, 2)
    return Tile(32, 64, 4, 2) if arithmetic == "fma" else Tile(32, 128, 8, 2)


# A sum is split until two programs a multiprocessor run; a shorter part costs more than it fills.
# Parts eight times as long spare a small step, which the host bounds, 112 launches (Llama-3.2-1B,
# 512 tokens, H100): it took as long, and its kernels 28 % longer.


def feature_splits(gpu: Gpu, k: int, programs: int, tile: Tile) -> tuple[int, int]:
    """How many parts a sum over K features has, and the features of each, in multiples of a
    tile's columns.
    """
    return splits_of(gpu, k, programs, tile.columns, most=8, least=512)


def row_splits(gpu: Gpu, m: int, programs: int, tile: Tile) -> tuple[int, int]:
    """The same of a sum over M rows, in multiples of a tile's rows."""
    return splits_of(gpu, m, programs, tile.rows, most=16, least=256)


def splits_of(
    gpu: Gpu, size: int, programs: int, block: int, *, most: int, least: int
) -> tuple[int, int]:
    splits = min(divide_up(2 * gpu.multiprocessors, programs), most, max(size // least, 1))
    each = divide_up(divide_up(size, splits), block) * block
    return divide_up(size, each), each


# Segments: tile, rows and ranks are read from tables, which costs registers: as for one branch, but
# narrower where that would spill.

SEGMENTED_UP_BLOCK_R = 16  # as `up_block_r`


@functools.cache
def segmented_down_tile(capability: int, arithmetic: str, block_r: int, dropout: bool) -> Tile:
    """[rows of x, features per step]."""
    tile = down_tile(capability, arithmetic, block_r, dropout)
    if arithmetic == "fma" and block_r >= 32 and capability >= 80:  # fp32: 16 bytes a thread
        return Tile(32, 32, 8, tile.stages)
    return tile


@functools.cache
def segmented_weight_grad_tile(
    capability: int, arithmetic: str, block_r: int, dropout: bool
) -> Tile:
    """[rows per step, features of the output]."""
    if arithmetic == "terms" and block_r == 32:
        return for_bandwidth(capability, Tile(32, 128, 4, 4))
    if arithmetic == "terms" and block_r >= 64 and capability != 90:
        return for_bandwidth(capability, Tile(32, 64, 8, 4))
    return weight_grad_tile(capability, arithmetic, block_r, dropout)

"""Tiles of the LoRA kernels by GPU, arithmetic, rank and dropout. See `tables` for why a table."""

from __future__ import annotations

import functools

import torch

from .tables import Gpu, Tile

# How `_dot_exact` computes a product:
#   "mma"    both operands of one 16-bit dtype, tensor cores
#   "terms"  bf16 with fp32, the fp32 operand as three bf16 terms, tensor cores
#   "terms6" fp16 with fp32, two by three bf16 terms, tensor cores
#   "fma"    fp32 multiply-adds


@functools.cache
def arithmetic_of(gpu: Gpu, lhs: torch.dtype, rhs: torch.dtype) -> str:
    if lhs == rhs:
        return "fma" if lhs == torch.float32 else "mma"
    if gpu.capability < 80 or torch.float32 not in (lhs, rhs):
        return "fma"
    return "terms" if torch.bfloat16 in (lhs, rhs) else "terms6"


def has_small_shared_memory(capability: int) -> bool:
    """Whether a program gets at most 99 KB (64 KB on sm_75) instead of 163 KB or more."""
    return capability in (75, 86, 87, 89, 120, 121)


@functools.cache
def down_tile(capability: int, arithmetic: str, block_r: int, dropout: bool) -> Tile:
    if arithmetic == "fma":
        return Tile(64, 32, 4 if block_r <= 64 else 8, 3)
    if arithmetic == "mma":
        return Tile(64, 64, 4, 4) if block_r <= 64 else Tile(128, 64, 8, 3)
    return Tile(64, 64, 4, 4) if block_r <= 32 else Tile(64, 64, 8, 3)


@functools.cache
def up_tile(capability: int, arithmetic: str, block_r: int, dropout: bool) -> Tile:
    if arithmetic == "fma":
        return Tile(64, 64, 4, 2)
    return Tile(64, 128, 4 if block_r <= 32 else 8, 2)


@functools.cache
def up_block_r(arithmetic: str, block_r: int) -> int:
    """The step through the rank. Multiply-adds hold a whole step of both operands in registers."""
    return 16 if arithmetic == "fma" else min(block_r, 64)


@functools.cache
def weight_grad_tile(capability: int, arithmetic: str, block_r: int, dropout: bool) -> Tile:
    if arithmetic == "fma":
        return Tile(32, 64, 4, 3) if block_r <= 64 else Tile(16, 64, 4, 3)
    if block_r <= 32:
        return Tile(64, 128, 4, 3)
    return Tile(32, 128, 8, 3)


@functools.cache
def pair_tile(capability: int, arithmetic: str, block_r: int) -> Tile | None:
    """None where two products are better: the rank is too high for the partial sums to pay."""
    if block_r > 32:
        return None
    if arithmetic == "fma":
        return Tile(32, 64, 4, 3) if block_r <= 16 else None
    if arithmetic == "mma":
        return Tile(64, 256, 8, 2 if has_small_shared_memory(capability) else 3)
    return Tile(64, 128, 4 if block_r <= 16 else 8, 3)

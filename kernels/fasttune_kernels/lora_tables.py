"""Tiles of the LoRA kernels by GPU, arithmetic, rank and dropout. See `tables` for why a table."""

from __future__ import annotations

import functools

import torch

from .tables import Gpu, Tile

# How `_dot_exact` computes: "mma" (one 16-bit dtype on tensor cores), "terms" (an fp32 operand as
# bf16 terms on tensor cores) or "fma" (fp32 multiply-adds).


@functools.cache
def arithmetic_of(gpu: Gpu, lhs: torch.dtype, rhs: torch.dtype) -> str:
    if lhs == rhs:
        return "fma" if lhs == torch.float32 else "mma"
    with_fp32 = torch.float32 in (lhs, rhs)
    return "terms" if with_fp32 and gpu.capability >= 80 else "fma"


@functools.cache
def down_tile(
    capability: int, arithmetic: str, element_size: int, block_r: int, dropout: bool
) -> Tile:
    if block_r <= 64:
        return Tile(64, 64, 4, 4)
    return Tile(128, 64, 8, 3)


@functools.cache
def up_tile(
    capability: int, arithmetic: str, element_size: int, block_r: int, dropout: bool
) -> Tile:
    return Tile(64, 128, 4, 2)


@functools.cache
def weight_grad_tile(
    capability: int, arithmetic: str, element_size: int, block_r: int, dropout: bool
) -> Tile:
    if block_r <= 64:
        return Tile(64, 128, 4, 3)
    return Tile(64, 128, 8, 3)


@functools.cache
def pair_tile(capability: int, arithmetic: str, element_size: int, block_r: int) -> Tile:
    return Tile(64, 256, 8, 3)

"""Kernels over many tensors in one launch: their addresses, and which program takes what."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adamw_tables import BLOCK
from .tables import divide_up

_VECTOR_BYTES = 16
ELEMENT = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
}


@lru_cache(maxsize=32)
def blocks_of(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[blocks, 3] int32: the tensor of each block, its number there, and how many that tensor has;
    copied to the device once for each set of sizes.
    """
    counts = torch.tensor([divide_up(size, BLOCK) for size in sizes])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = torch.cumsum(counts, 0) - counts
    number = torch.arange(int(counts.sum())) - first[tensor]
    table = torch.stack([tensor, number, counts[tensor]], dim=1).to(torch.int32)
    return table.to(device)


def uploaded(table: Tensor, device: torch.device) -> Tensor:
    """An int64 table of the host on the device, by one copy that nothing waits for."""
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=32)
def _counters(device: torch.device, stream: int, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def counters(device: torch.device, count: int) -> Tensor:
    """Zeros [>= count] int32 of the current stream, which every kernel leaves as zeros: a launch
    less than clearing them.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _counters(device, stream, triton.next_power_of_2(max(count, 1024)))


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every address allows accesses of 16 bytes."""
    return all(tensor.data_ptr() % _VECTOR_BYTES == 0 for tensor in tensors)


@triton.jit
def pointer_to(address, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """An address read from a table as a pointer."""
    pointer = address.to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def is_last(counter_ptr, count):
    """Whether `count` programs have come here, this one the last; the counter is zero again then.

    What they stored before is visible to the last one.
    """
    tl.debug_barrier()  # all of this program's stores precede the increment
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def sum_of_column(partial_ptr, count, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of partial[0 .. count) in fp64, in fixed order, past the cache of other programs."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, count, BLOCK):
        at = start + i
        part = tl.load(partial_ptr + at * STRIDE, mask=at < count, other=0.0, cache_modifier=".cg")
        total += part.to(tl.float64)
    return tl.sum(total, axis=0)

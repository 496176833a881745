"""What kernels over many tensors share: pointers read from a table, and sums over programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENT = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
}


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

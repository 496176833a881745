"""Tables of kernels over many tensors, for every tier: where the tensors lie, and which program
takes what. Needs no Triton.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .adamw_tables import ADDRESSES, BLOCK

_VECTOR_BYTES = 16
_SMALLEST = 1024  # counters: sets of fewer tensors share one


@lru_cache(maxsize=32)
def blocks_of(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[blocks, 3] int32: the tensor of each block, its number there, and how many that tensor has;
    copied to the device once for each set of sizes.
    """
    counts = torch.tensor([-(-size // BLOCK) for size in sizes])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = torch.cumsum(counts, 0) - counts
    number = torch.arange(int(counts.sum())) - first[tensor]
    table = torch.stack([tensor, number, counts[tensor]], dim=1).to(torch.int32)
    return table.to(device)


def address_table(
    operands: Sequence[Sequence[Tensor]],
    sizes: Sequence[int],
    scalars: Sequence[Sequence[Tensor]] = (),
) -> Tensor:
    """[n, 11] int64 with the columns ADDRESSES, on the host; ``scalars`` are those after numel. 0
    where a list is empty or missing.
    """
    width, middle = len(ADDRESSES), ADDRESSES.index("numel")
    table = array("q", bytes(8 * width * len(sizes)))
    table[middle::width] = array("q", sizes)
    for first, lists in ((0, operands), (middle + 1, scalars)):
        for column, tensors in enumerate(lists, start=first):
            if tensors:
                table[column::width] = array("q", map(Tensor.data_ptr, tensors))
    return torch.frombuffer(table, dtype=torch.int64).view(-1, width)


def limit_table(
    params: Sequence[Tensor],
    residues: Sequence[Tensor],
    sizes: Sequence[int],
    limits: Tensor,  # [n] float64 on the host
) -> Tensor:
    """[n, 4] int64 with the columns LIMITS, on the host."""
    lists = [list(map(Tensor.data_ptr, tensors)) for tensors in (params, residues)]
    columns = [own or [0] * len(sizes) for own in lists]
    bits = limits.contiguous().view(torch.int64)
    return torch.stack([*map(torch.tensor, (*columns, sizes)), bits], dim=1)


def uploaded(table: Tensor, device: torch.device) -> Tensor:
    """A table of the host on the device, by one copy that nothing waits for."""
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
    return _counters(device, stream, max(_SMALLEST, 1 << (count - 1).bit_length()))


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every address allows accesses of 16 bytes."""
    return all(tensor.data_ptr() % _VECTOR_BYTES == 0 for tensor in tensors)

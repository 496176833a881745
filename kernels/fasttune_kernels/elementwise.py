"""How elementwise kernels cut their operands."""

from __future__ import annotations

from torch import Tensor

from .tables import next_power_of_2

# 256 threads with two 16-byte accesses to each operand: enough in flight at half occupancy.
THREADS = 256
BYTES_PER_THREAD = 32


def joined_shape(*matrices: Tensor | None) -> tuple[int, int]:
    """(rows, columns) of matrices of one shape; one row if all are contiguous: one tail then."""
    given = [x for x in matrices if x is not None]
    rows, columns = given[0].shape
    if all(x.is_contiguous() for x in given):
        return 1, rows * columns
    return rows, columns


def block_of(columns: int, *matrices: Tensor | None) -> tuple[int, int]:
    """(elements, warps) of a program over a row; the widest element type sets the elements."""
    size = max(x.element_size() for x in matrices if x is not None)
    per_thread = BYTES_PER_THREAD // size
    block = min(max(next_power_of_2(columns), 32 * per_thread), THREADS * per_thread)
    return block, block // (32 * per_thread)

"""AdamW over many tensors, in C++. The tables are those of ``fasttune_kernels.adamw_tables``."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from fasttune._native._extension import DTYPE_CODES, cpu, threads
from fasttune_kernels.adamw_tables import ADDRESSES, MOMENTS, ROUNDINGS


def sums_of_squares(grads: Sequence[Tensor]) -> Tensor:
    """[n] float64: the sum of squares of each gradient; all of one dtype, dense."""
    count = len(grads)
    table = address_table([(), grads], list(map(Tensor.numel, grads)))
    out = torch.empty(count, dtype=torch.float64)
    code = DTYPE_CODES[grads[0].dtype]
    cpu().sums_of_squares(table.buffer_info()[0], count, code, out.data_ptr(), threads())
    return out


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    residues: Sequence[Tensor],
    scales: Sequence[Tensor],
    facts: Tensor,  # [n, 7] float64, contiguous
    *,
    moments: str,
    rounding: str,
    grad_factor: float,
    seed: int,
) -> Tensor:
    """[n, 3] float64: squared norms of gradient, update and updated parameter. In place; lists
    that are empty are not used.
    """
    count = len(params)
    operands = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, residues, scales)
    table = address_table(operands, list(map(Tensor.numel, params)))
    norms = torch.empty(count, 3, dtype=torch.float64)
    cpu().adamw_step(
        table.buffer_info()[0],
        facts.data_ptr(),
        count,
        DTYPE_CODES[params[0].dtype],
        DTYPE_CODES[grads[0].dtype],
        MOMENTS.index(moments),
        ROUNDINGS.index(rounding),
        grad_factor,
        seed & (2**64 - 1),
        norms.data_ptr(),
        threads(),
    )
    return norms


def address_table(
    operands: Sequence[Sequence[Tensor]],
    sizes: Sequence[int],
    scalars: Sequence[Sequence[Tensor]] = (),
) -> array[int]:
    """The rows of the table, flat; ``scalars`` are the columns after numel. 0 where none is."""
    width, middle = len(ADDRESSES), ADDRESSES.index("numel")
    table = array("q", bytes(8 * width * len(sizes)))
    table[middle::width] = array("q", sizes)
    for first, lists in ((0, operands), (middle + 1, scalars)):
        for column, tensors in enumerate(lists, start=first):
            if tensors:
                table[column::width] = array("q", map(Tensor.data_ptr, tensors))
    return table

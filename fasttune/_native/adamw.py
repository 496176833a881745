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
    columns = [[], _addresses(grads), [], [], [], [], [], _sizes(grads)]
    table = _interleaved(columns, count)
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
    columns = [_addresses(tensors) for tensors in operands]
    table = _interleaved([*columns, _sizes(params)], count)
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


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.numel, tensors))


def _interleaved(columns: Sequence[Sequence[int]], rows: int) -> array[int]:
    """The first columns of a table as its rows; 0 where a column is empty or missing."""
    width = len(ADDRESSES)
    table = array("q", bytes(8 * width * rows))
    for index, column in enumerate(columns):
        if column:
            table[index::width] = array("q", column)
    return table

"""AdamW over many tensors, in C++. The tables are those of ``fasttune_kernels.adamw_tables``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttune._native._extension import DTYPE_CODES, cpu, threads
from fasttune_kernels.adamw_tables import MOMENTS, ROUNDINGS, StepArguments
from fasttune_kernels.multi_tensor_tables import address_table, limit_table


def sums_of_squares(grads: Sequence[Tensor]) -> Tensor:
    """[n] float64: the sum of squares of each gradient; all of one dtype, dense."""
    count = len(grads)
    table = address_table([(), grads], list(map(Tensor.numel, grads)))
    out = torch.empty(count, dtype=torch.float64)
    code = DTYPE_CODES[grads[0].dtype]
    cpu().sums_of_squares(table.data_ptr(), count, code, out.data_ptr(), threads())
    return out


def adamw_step(arguments: StepArguments, *, grad_factor: float) -> Tensor:
    """[n, 3] float64: squared norms of gradient, update and updated parameter. In place; every
    number of the step stands in the table of facts.

    Args:
        grad_factor: unscales, clips, and has the sign of the direction.
    """
    count = len(arguments.params)
    table = address_table(arguments.operands, arguments.sizes)
    facts = arguments.facts.contiguous()
    norms = torch.empty(count, 3, dtype=torch.float64)
    cpu().adamw_step(
        table.data_ptr(),
        facts.data_ptr(),
        count,
        DTYPE_CODES[arguments.params[0].dtype],
        DTYPE_CODES[arguments.grads[0].dtype],
        MOMENTS.index(arguments.moments),
        ROUNDINGS.index(arguments.rounding),
        grad_factor,
        arguments.seed & (2**64 - 1),
        norms.data_ptr(),
        threads(),
    )
    return norms


def limit_norms(
    params: Sequence[Tensor],
    residues: Sequence[Tensor],
    norms: Tensor,  # [n, 3] fp32
    limits: Tensor,  # [n] float64
    rounding: str,
) -> None:
    """Scales each parameter whose norm is above its limit down to it, in place."""
    table = limit_table(params, residues, list(map(Tensor.numel, params)), limits)
    norms = norms.contiguous()
    cpu().limit_norms(
        table.data_ptr(),
        norms.data_ptr(),
        len(params),
        DTYPE_CODES[params[0].dtype],
        ROUNDINGS.index(rounding),
        threads(),
    )

"""AdamW over many tensors, in CUDA C++; the tables are ``fasttune_kernels.adamw_tables``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttune._native._cuda import launch
from fasttune._native._extension import DTYPE_CODES
from fasttune_kernels.adamw_tables import MOMENTS, ROUNDINGS, StepArguments
from fasttune_kernels.multi_tensor_tables import (
    address_table,
    blocks_of,
    counters,
    limit_table,
    uploaded,
)

_SEED_MASK = 2**64 - 1


def sum_of_squares(grads: Sequence[Tensor]) -> Tensor:
    """0-d float64 on the device of the gradients, which are contiguous and of one dtype."""
    device = grads[0].device
    sizes = tuple(map(Tensor.numel, grads))
    out = torch.zeros((), dtype=torch.float64, device=device)
    blocks = blocks_of(sizes, device)
    if not len(blocks):
        return out
    table = uploaded(address_table([(), grads], sizes), device)
    partial = torch.empty(len(blocks), device=device)
    launch(
        "grad_norm",
        device,
        *(table, blocks, len(blocks), partial, counters(device, 1), out),
        DTYPE_CODES[grads[0].dtype],
        reachable=grads,
    )
    return out


def adamw_step(arguments: StepArguments) -> Tensor:
    """Norms [n, 3] fp32; the step in place."""
    params, sizes = arguments.params, arguments.sizes
    device, count = params[0].device, len(params)
    norms = torch.zeros(count, 3, device=device)
    blocks = blocks_of(sizes, device)
    if not len(blocks):
        return norms
    operands, scalars = arguments.operands, arguments.scalars
    addresses = address_table(operands, sizes, scalars).flatten()
    # One copy to the device for both tables.
    facts = arguments.facts.contiguous().view(torch.int64).flatten()
    tables = uploaded(torch.cat([addresses, facts]), device)
    partial = torch.empty(len(blocks), 3, device=device)
    launch(
        "adamw",
        device,
        *(tables, tables[len(addresses) :], blocks, len(blocks)),
        *(partial, counters(device, count), norms),
        *(arguments.squares, arguments.grad_scale, arguments.found_inf),
        *(arguments.max_grad_norm, -1.0 if arguments.maximize else 1.0),
        *(arguments.skip_nonfinite, arguments.seed & _SEED_MASK),
        *(DTYPE_CODES[params[0].dtype], DTYPE_CODES[arguments.grads[0].dtype]),
        *(MOMENTS.index(arguments.moments), ROUNDINGS.index(arguments.rounding)),
        reachable=[tensor for tensors in (*operands, *scalars) for tensor in tensors],
    )
    return norms


def limit_norms(
    params: Sequence[Tensor],
    residues: Sequence[Tensor],
    norms: Tensor,  # [n, 3] fp32
    limits: Tensor,  # [n] float64 on the host
    rounding: str,
) -> None:
    """Scales each parameter whose norm is above its limit down to it, in place."""
    device = params[0].device
    sizes = tuple(map(Tensor.numel, params))
    blocks = blocks_of(sizes, device)
    if not len(blocks):
        return
    table = uploaded(limit_table(params, residues, sizes, limits), device)
    launch(
        "limit_norms",
        device,
        *(table, blocks, len(blocks), norms.contiguous()),
        *(DTYPE_CODES[params[0].dtype], ROUNDINGS.index(rounding)),
        reachable=[*params, *residues],
    )

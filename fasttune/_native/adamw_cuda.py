"""AdamW over many tensors, in CUDA C++; the tables are ``fasttune_kernels.adamw_tables``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttune._native._cuda import launch
from fasttune._native._extension import DTYPE_CODES
from fasttune_kernels.adamw_tables import ADDRESSES, MOMENTS, ROUNDINGS, StepArguments
from fasttune_kernels.multi_tensor_tables import (
    address_table,
    blocks_of,
    counters,
    limit_table,
    uploaded,
)

_SEED_MASK = 2**64 - 1


def sum_of_squares(grads: Sequence[Tensor], table: Tensor | None = None) -> Tensor:
    """0-d float64 on the device of the gradients, which are contiguous and of one dtype; ``table``
    is the step_table of a step with these gradients, if it is on the device already.
    """
    device = grads[0].device
    sizes = tuple(map(Tensor.numel, grads))
    out = torch.zeros((), dtype=torch.float64, device=device)
    blocks = blocks_of(sizes, device)
    if not len(blocks):
        return out
    if table is None:
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


def step_table(arguments: StepArguments) -> Tensor:
    """[18 n] int64 on the host: the addresses of all tensors, then their facts as bits of fp64."""
    addresses = address_table(arguments.operands, arguments.sizes, arguments.scalars)
    facts = arguments.facts.contiguous().view(torch.int64)
    return torch.cat([addresses.flatten(), facts.flatten()])


def adamw_step(arguments: StepArguments) -> Tensor:
    """Norms [n, 3] fp32; the step in place."""
    params, sizes = arguments.params, arguments.sizes
    device, count = params[0].device, len(params)
    norms = torch.zeros(count, 3, device=device)
    blocks = blocks_of(sizes, device)
    if not len(blocks):
        return norms
    operands, scalars = arguments.operands, arguments.scalars
    table = arguments.table
    if table is None:
        table = uploaded(step_table(arguments), device)
    partial = torch.empty(len(blocks), 3, device=device)
    launch(
        "adamw",
        device,
        *(table, table[len(ADDRESSES) * count :], blocks, len(blocks)),
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

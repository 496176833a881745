"""AdamW over many tensors, in CUDA C++; the tables are ``fasttune_kernels.adamw_tables``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fasttune._native._cuda import launch
from fasttune._native._extension import DTYPE_CODES
from fasttune._native.adamw import address_table
from fasttune_kernels.adamw_tables import BLOCK, MOMENTS, ROUNDINGS

_SEED_MASK = 2**64 - 1


def sum_of_squares(grads: Sequence[Tensor]) -> Tensor:
    """0-d float64 on the device of the gradients, which are contiguous and of one dtype."""
    device = grads[0].device
    sizes = tuple(map(Tensor.numel, grads))
    out = torch.zeros((), dtype=torch.float64, device=device)
    blocks = _blocks_of(sizes, device)
    if not len(blocks):
        return out
    table = _uploaded(torch.tensor(address_table([(), grads], sizes)), device)
    partial = torch.empty(len(blocks), device=device)
    launch(
        "grad_norm",
        device,
        *(table, blocks, len(blocks), partial, _counters(device, 1), out),
        DTYPE_CODES[grads[0].dtype],
        reachable=grads,
    )
    return out


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    residues: Sequence[Tensor],
    scales: Sequence[Tensor],
    facts: Tensor,  # [n, 7] float64 on the host
    lrs: Sequence[Tensor],
    decays: Sequence[Tensor],
    steps: Sequence[Tensor],
    squares: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_grad_norm: float,
    skip_nonfinite: bool,
    rounding: str,
    maximize: bool,
    seed: int,
    *,
    moments: str,
) -> Tensor:
    """Norms [n, 3] fp32; the step in place. All tensors contiguous, each list of one dtype."""
    device, count = params[0].device, len(params)
    sizes = tuple(map(Tensor.numel, params))
    norms = torch.zeros(count, 3, device=device)
    blocks = _blocks_of(sizes, device)
    if not len(blocks):
        return norms
    operands = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, residues, scales)
    scalars = (lrs, decays, steps)
    addresses = torch.tensor(address_table(operands, sizes, scalars))
    # One copy to the device for both tables.
    tables = _uploaded(
        torch.cat([addresses, facts.contiguous().view(torch.int64).flatten()]), device
    )
    partial = torch.empty(len(blocks), 3, device=device)
    launch(
        "adamw",
        device,
        *(tables, tables[len(addresses) :], blocks, len(blocks)),
        *(partial, _counters(device, count), norms, squares, grad_scale, found_inf),
        *(max_grad_norm, -1.0 if maximize else 1.0, skip_nonfinite, seed & _SEED_MASK),
        *(DTYPE_CODES[params[0].dtype], DTYPE_CODES[grads[0].dtype]),
        *(MOMENTS.index(moments), ROUNDINGS.index(rounding)),
        reachable=[tensor for tensors in (*operands, *scalars) for tensor in tensors],
    )
    return norms


@lru_cache(maxsize=32)
def _blocks_of(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[blocks, 3] int32: the tensor of each block, its number there, and how many that tensor has;
    copied to the device once for each set of sizes.
    """
    counts = [-(-size // BLOCK) for size in sizes]
    rows = [(i, j, count) for i, count in enumerate(counts) for j in range(count)]
    return torch.tensor(rows, dtype=torch.int32).view(-1, 3).to(device)


def _uploaded(table: Tensor, device: torch.device) -> Tensor:
    """A table of the host on the device, by one copy that nothing waits for."""
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)


def _counters(device: torch.device, count: int) -> Tensor:
    """Zeros [>= count] int32 of the current stream, which every kernel leaves as zeros: a launch
    less than clearing them.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _zeros(device, stream, max(1024, 1 << (count - 1).bit_length()))


@lru_cache(maxsize=32)
def _zeros(device: torch.device, stream: int, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)

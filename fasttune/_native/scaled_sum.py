"""The end of a bottleneck adapter, in C++: dropout, scale and sum in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune._native._extension import cpu, fp32, threads
from fasttune._native.lora_linear import dropout_of


def scaled_sum(
    x: Tensor,  # [M, N]
    addend: Tensor | None,  # [M, N]
    column_scale: Tensor | None,  # [N]
    scale: float,
    *,
    seed: Tensor | None,
    threshold: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """addend + keep * x scale column_scale, [M, N] in ``out_dtype``."""
    out = torch.empty(x.shape, dtype=out_dtype)
    columns = None if column_scale is None else fp32(column_scale)
    cpu().scaled_sum(
        x,
        addend,
        0 if columns is None else columns.data_ptr(),
        scale,
        dropout_of(seed, threshold, 0, 0),
        out,
        threads(),
    )
    return out

"""RMS normalisation of rows, in CUDA C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune._native._cuda import launch
from fasttune._native._extension import DTYPE_CODES

# Sums over the rows come from this many blocks at most, the same on every GPU, so that their order
# depends on the shape alone: about two waves of the largest GPUs.
MAX_PARTS = 512


def rms_norm_forward(
    x: Tensor,  # [M, H], unit column stride
    weight: Tensor | None,  # [H] in x's dtype or fp32
    *,
    eps: float,
    weight_offset: float,
    round_first: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y [M, H] in x's dtype or fp32, and rstd [M] fp32; docs/design.md states the formulas."""
    return _forward(x, None, None, weight, eps, weight_offset, round_first, out_dtype)


def add_rms_norm_forward(
    x: Tensor,  # [M, H], unit column stride
    residual: Tensor,  # [M, H] in x's dtype, likewise
    weight: Tensor | None,  # [H] in x's dtype or fp32
    *,
    eps: float,
    weight_offset: float,
    round_first: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [M, H], s [M, H] = x + residual in x.dtype, and rstd [M] fp32."""
    s = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y, rstd = _forward(x, residual, s, weight, eps, weight_offset, round_first, out_dtype)
    return y, s, rstd


def _forward(
    x: Tensor,
    residual: Tensor | None,
    s: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    launch(
        "rms_norm_fwd",
        x.device,
        *(x, residual, weight, y, s, rstd, *x.shape),
        *(x.stride(0), _stride(residual), y.stride(0), _stride(s)),
        *(DTYPE_CODES[x.dtype], _code(weight, x), DTYPE_CODES[out_dtype]),
        *(float(eps), float(weight_offset), round_first),
    )
    return y, rstd


def rms_norm_backward(
    dy: Tensor,  # [M, H] in x's dtype or fp32, unit column stride
    x: Tensor,  # [M, H], likewise
    weight: Tensor | None,  # [H] in x's dtype or fp32
    rstd: Tensor,  # [M] fp32
    addend: Tensor | None,  # [M, H] in x.dtype, unit column stride
    *,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, H] in x.dtype with addend added, dweight [H] fp32; None where not needed."""
    rows, cols = x.shape
    parts = min(rows, MAX_PARTS) if need_dweight else rows
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else None
    dweight = torch.zeros(cols, device=x.device) if need_dweight else None
    partial = torch.empty(parts, cols, device=x.device) if need_dweight else None
    launch(
        "rms_norm_bwd",
        x.device,
        *(dy, x, weight, rstd, addend, dx, partial, dweight, rows, cols),
        *(dy.stride(0), x.stride(0), _stride(addend), _stride(dx), parts),
        *(DTYPE_CODES[dy.dtype], DTYPE_CODES[x.dtype], _code(weight, x), float(weight_offset)),
    )
    return dx, dweight


def _stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def _code(weight: Tensor | None, x: Tensor) -> int:
    return DTYPE_CODES[x.dtype if weight is None else weight.dtype]

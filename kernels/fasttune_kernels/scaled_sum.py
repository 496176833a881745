"""The end of a bottleneck adapter: dropout, scale and sum in one pass.

Legend: M rows (tokens), N features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .philox import keep_mask, load_philox_key
from .tables import MAX_REGISTERS, divide_up, launch_device

_ROWS, _COLUMNS, _WARPS = 8, 256, 4  # 16 elements a thread: 32 bytes of each 16-bit operand


# Floor per element in 16 bits: 4 bytes read and 2 written, three operations and a mask of about 10.
@triton.jit(do_not_specialize=["M", "scale", "threshold"])
def _scaled_sum_kernel(
    x_ptr,  # [M, N], columns adjacent
    addend_ptr,  # [M, N] or None
    column_scale_ptr,  # [N] or None
    seed_ptr,  # 0-d int64, or None without dropout
    out_ptr,  # [M, N]
    M,
    N,
    stride_xm: tl.int64,
    stride_am: tl.int64,
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pieces = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // pieces).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = (tl.program_id(0) % pieces) * BLOCK_N
    n = start.to(tl.int64) + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (n < N)[None, :]
    value = tl.load(x_ptr + rows[:, None] * stride_xm + n[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32) * scale
    if column_scale_ptr is not None:
        columns = tl.load(column_scale_ptr + n, mask=n < N, other=0.0)
        value *= columns.to(tl.float32)[None, :]
    if seed_ptr is not None:
        key0, key1 = load_philox_key(seed_ptr)
        branch = start * 0
        keep = keep_mask(rows, start, key0, key1, branch, threshold, BLOCK_M, BLOCK_N)
        value = tl.where(keep, value, 0.0)
    if addend_ptr is not None:
        addend = tl.load(
            addend_ptr + rows[:, None] * stride_am + n[None, :], mask=inside, other=0.0
        )
        value += addend.to(tl.float32)
    out = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * N + n[None, :], out, mask=inside)


def scaled_sum(
    x: Tensor,  # [M, N] fp32 / bf16 / fp16, unit column stride
    addend: Tensor | None,  # [M, N], likewise
    column_scale: Tensor | None,  # [N]
    scale: float,
    *,
    seed: Tensor | None,  # 0-d int64
    threshold: int,  # 0: no dropout
    out_dtype: torch.dtype,
) -> Tensor:
    """addend + keep * x scale column_scale, [M, N] in ``out_dtype``."""
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    grid = (divide_up(rows, _ROWS) * divide_up(columns, _COLUMNS),)
    with launch_device(x):
        launch(
            _scaled_sum_kernel,
            grid,
            x,
            addend,
            column_scale,
            seed if threshold else None,
            out,
            rows,
            columns,
            x.stride(0),
            0 if addend is None else addend.stride(0),
            scale,
            threshold,
            BLOCK_M=_ROWS,
            BLOCK_N=_COLUMNS,
            num_warps=_WARPS,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
    return out

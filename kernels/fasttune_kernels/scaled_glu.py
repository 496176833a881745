"""The gated activation of an MLP whose hidden state (IA)^3 scales, y = act(gate) * up * scale, and
its gradients, the scale's included, in one pass each.

Legend: M rows (tokens), I intermediate features. gate and up may be the halves of one [M, 2I].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_with_slope
from .elementwise import block_of
from .launch import launch
from .partials import sum_rows
from .tables import MAX_REGISTERS, divide_up, gpu_of, launch_device

_ROWS, _COLUMNS, _WARPS = 16, 128, 4  # 16 elements a thread: 32 bytes of each 16-bit operand


# Floor per element in 16 bits: 4 bytes read and 2 written, as _glu_forward_kernel; the scale stays
# in the caches.
@triton.jit
def _scaled_glu_forward_kernel(
    gate_ptr,  # [M, I], columns adjacent
    up_ptr,  # [M, I], columns adjacent
    scale_ptr,  # [I]
    y_ptr,  # [M, I]
    I,
    stride_gm: tl.int64,
    stride_um: tl.int64,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pieces = tl.cdiv(I, BLOCK)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    i = (tl.program_id(0) % pieces).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < I
    gate = tl.load(gate_ptr + row * stride_gm + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_um + i, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + i, mask=inside, other=0.0).to(tl.float32)
    y = activate(gate, ACTIVATION) * up * scale
    tl.store(y_ptr + row * I + i, y.to(y_ptr.dtype.element_ty), mask=inside)


# Floor per element in 16 bits: 6 bytes read and 4 written, about 40 operations; the partial sums
# are 4 I a split of the rows. A program owns 128 columns and walks down its rows.
@triton.jit(do_not_specialize=["M", "rows_per_program"])
def _scaled_glu_backward_kernel(
    dy_ptr,  # [M, I], columns adjacent
    gate_ptr,  # [M, I], columns adjacent
    up_ptr,  # [M, I], columns adjacent
    scale_ptr,  # [I]
    dgate_ptr,  # [M, I], columns adjacent, or None
    dup_ptr,  # [M, I], columns adjacent, or None
    dscale_ptr,  # [splits, I] fp32 or None
    M,
    I,
    stride_ym: tl.int64,
    stride_gm: tl.int64,
    stride_um: tl.int64,
    stride_dgm: tl.int64,
    stride_dum: tl.int64,
    rows_per_program,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    split = tl.program_id(1).to(tl.int64)
    begin = split * rows_per_program
    scale = tl.load(scale_ptr + columns, mask=columns < I, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in tl.range(
        begin, tl.minimum(begin + rows_per_program, M), BLOCK_M, num_stages=STAGES
    ):
        rows = (first + tl.arange(0, BLOCK_M))[:, None]
        inside = (rows < M) & (columns < I)
        dy = tl.load(dy_ptr + rows * stride_ym + columns, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + rows * stride_gm + columns, mask=inside, other=0.0)
        up = tl.load(up_ptr + rows * stride_um + columns, mask=inside, other=0.0).to(tl.float32)
        value, slope = activate_with_slope(gate.to(tl.float32), ACTIVATION)
        sums += dy * (value * up)
        dh = dy * scale
        if dgate_ptr is not None:
            dgate = (dh * up * slope).to(dgate_ptr.dtype.element_ty)
            tl.store(dgate_ptr + rows * stride_dgm + columns, dgate, mask=inside)
        if dup_ptr is not None:
            dup = (dh * value).to(dup_ptr.dtype.element_ty)
            tl.store(dup_ptr + rows * stride_dum + columns, dup, mask=inside)
    if dscale_ptr is not None:
        total = tl.sum(sums, 0, keep_dims=True)
        tl.store(dscale_ptr + split * I + columns, total, mask=columns < I)


def scaled_glu_forward(
    gate: Tensor,  # [M, I] fp32 / bf16 / fp16, unit column stride
    up: Tensor,  # [M, I], likewise
    scale: Tensor,  # [I]
    *,
    activation: str,
) -> Tensor:
    """-> y [M, I] = act(gate) up scale, in the dtype that torch promotes gate and up to."""
    y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    if y.numel() == 0:
        return y
    rows, columns = gate.shape
    block, warps = block_of(columns, gate, up)
    with launch_device(gate):
        launch(
            _scaled_glu_forward_kernel,
            (rows * divide_up(columns, block),),
            gate,
            up,
            scale.contiguous(),
            y,
            columns,
            gate.stride(0),
            up.stride(0),
            ACTIVATION=activation,
            BLOCK=block,
            num_warps=warps,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
    return y


def scaled_glu_backward(
    dy: Tensor,  # [M, I] fp32 / bf16 / fp16, unit column stride
    gate: Tensor,  # [M, I], likewise
    up: Tensor,  # [M, I], likewise
    scale: Tensor,  # [I]
    *,
    activation: str,
    dgate: Tensor | None,  # [M, I], likewise; written
    dup: Tensor | None,  # [M, I], likewise; written
    need_dscale: bool,
) -> Tensor | None:
    """dgate = dy scale up act'(gate), dup = dy scale act(gate), None where not needed.

    -> dscale [I] fp32 = the sum of dy act(gate) up, or None.
    """
    m, i = dy.shape
    if dy.numel() == 0:
        return torch.zeros(i, dtype=torch.float32, device=dy.device) if need_dscale else None
    columns = divide_up(i, _COLUMNS)
    # Fill the multiprocessors twice, with at least 64 rows per program.
    splits = min(divide_up(2 * gpu_of(dy).multiprocessors, columns), divide_up(m, 64))
    rows_per_program = divide_up(divide_up(m, splits), _ROWS) * _ROWS
    splits = divide_up(m, rows_per_program)
    partial = None
    if need_dscale:
        partial = torch.empty((splits, i), dtype=torch.float32, device=dy.device)
    with launch_device(dy):
        launch(
            _scaled_glu_backward_kernel,
            (columns, splits),
            dy,
            gate,
            up,
            scale.contiguous(),
            dgate,
            dup,
            partial,
            m,
            i,
            dy.stride(0),
            gate.stride(0),
            up.stride(0),
            0 if dgate is None else dgate.stride(0),
            0 if dup is None else dup.stride(0),
            rows_per_program,
            ACTIVATION=activation,
            BLOCK_M=_ROWS,
            BLOCK_N=_COLUMNS,
            STAGES=3 if gpu_of(dy).capability >= 80 else 1,
            num_warps=_WARPS,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
        return None if partial is None else sum_rows(partial)

"""The gated activation of an MLP, y = act(gate) * up, and its gradients.

Legend: M rows (tokens), I intermediate features. gate and up may be the halves of one [M, 2I].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_with_slope
from .elementwise import block_of, joined_shape
from .launch import launch
from .tables import MAX_REGISTERS, divide_up, launch_device


# Floor per element in 16 bits: 4 bytes read and 2 written, about 25 operations with one exponential
# and one division (gelu 40): below what an H100 does in the time of 6 bytes, 50. One piece of a row
# per program: all its loads are in flight before the arithmetic starts.
@triton.jit
def _glu_forward_kernel(
    gate_ptr,  # [M, I], columns adjacent
    up_ptr,  # [M, I], columns adjacent
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
    y = activate(gate, ACTIVATION) * up
    tl.store(y_ptr + row * I + i, y.to(y_ptr.dtype.element_ty), mask=inside)


# Floor per element in 16 bits: 6 bytes read and 4 written, about 35 operations.
@triton.jit
def _glu_backward_kernel(
    dy_ptr,  # [M, I], columns adjacent
    gate_ptr,  # [M, I], columns adjacent
    up_ptr,  # [M, I], columns adjacent
    dgate_ptr,  # [M, I], columns adjacent, or None
    dup_ptr,  # [M, I], columns adjacent, or None
    I,
    stride_ym: tl.int64,
    stride_gm: tl.int64,
    stride_um: tl.int64,
    stride_dgm: tl.int64,
    stride_dum: tl.int64,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pieces = tl.cdiv(I, BLOCK)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    i = (tl.program_id(0) % pieces).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < I
    dy = tl.load(dy_ptr + row * stride_ym + i, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gm + i, mask=inside, other=0.0).to(tl.float32)
    value, slope = activate_with_slope(gate, ACTIVATION)
    if dgate_ptr is not None:
        up = tl.load(up_ptr + row * stride_um + i, mask=inside, other=0.0).to(tl.float32)
        dgate = (dy * up * slope).to(dgate_ptr.dtype.element_ty)
        tl.store(dgate_ptr + row * stride_dgm + i, dgate, mask=inside)
    if dup_ptr is not None:
        dup = (dy * value).to(dup_ptr.dtype.element_ty)
        tl.store(dup_ptr + row * stride_dum + i, dup, mask=inside)


def glu_forward(
    gate: Tensor,  # [M, I] fp32 / bf16 / fp16, unit column stride
    up: Tensor,  # [M, I], likewise
    *,
    activation: str,
) -> Tensor:
    """-> y [M, I] = act(gate) up, in the dtype that torch promotes the two to."""
    y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    if y.numel() == 0:
        return y
    rows, columns = joined_shape(gate, up)
    block, warps = block_of(columns, gate, up)
    with launch_device(gate):
        launch(
            _glu_forward_kernel,
            (rows * divide_up(columns, block),),
            gate,
            up,
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


def glu_backward(
    dy: Tensor,  # [M, I] fp32 / bf16 / fp16, unit column stride
    gate: Tensor,  # [M, I], likewise
    up: Tensor,  # [M, I], likewise
    *,
    activation: str,
    dgate: Tensor | None,  # [M, I], likewise; written
    dup: Tensor | None,  # [M, I], likewise; written
) -> None:
    """dgate = dy up act'(gate), dup = dy act(gate); None where not needed."""
    if dy.numel() == 0:
        return
    rows, columns = joined_shape(dy, gate, up, dgate, dup)
    block, warps = block_of(columns, dy, gate, up)
    with launch_device(dy):
        launch(
            _glu_backward_kernel,
            (rows * divide_up(columns, block),),
            dy,
            gate,
            up,
            dgate,
            dup,
            columns,
            dy.stride(0),
            gate.stride(0),
            up.stride(0),
            0 if dgate is None else dgate.stride(0),
            0 if dup is None else dup.stride(0),
            ACTIVATION=activation,
            BLOCK=block,
            num_warps=warps,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )

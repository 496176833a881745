"""Rotary position embedding of queries and keys in one launch, and its transpose.

Legend: B batch, H heads, S positions, D features of a head, of which R rotate in pairs (i, j).
    y_i = x_i cos_i - x_j sin_i, y_j = x_j cos_j + x_i sin_j; the transpose has -sin_j in place of
    sin_i and -sin_i in place of sin_j.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tables import MAX_REGISTERS, divide_up, launch_device, next_power_of_2

_THREADS = 128
_VECTOR_BYTES = 16
# Heads per program. Heads lie along the registers of a thread, so that it keeps the cosines and
# sines of its positions for all of them, and that many loads of 16 bytes are in flight for each
# half of a row.
_BLOCK_H = 4
# What is only copied passes through registers as well: 64 of each thread.
_COPIED_BYTES = 256 * _THREADS


@triton.jit
def _rotate_pairs(xi, xj, cos_i, cos_j, sin_i, sin_j, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        return xi * cos_i + xj * sin_j, xj * cos_j - xi * sin_i
    return xi * cos_i - xj * sin_i, xj * cos_j + xi * sin_j


@triton.jit
def _rope_heads(
    x_ptr,
    y_ptr,
    cos_ptr,  # at this batch row
    sin_ptr,
    batch,  # int64
    head,
    heads,
    position,  # first of the program
    positions,
    x_stride_b,
    x_stride_h,
    x_stride_s,
    y_stride_b,
    y_stride_h,
    y_stride_s,
    cos_stride_s,
    sin_stride_s,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,  # columns of a tile: R of neighbours, R / 2 of halves, to a power of 2
    BLOCK_REST: tl.constexpr,  # D - R, to a power of 2
    COPIED_H: tl.constexpr,  # heads whose D - R features are copied at a time
):
    """Rotates BLOCK_H heads at BLOCK_S positions: [BLOCK_H, BLOCK_S, columns]."""
    h = head + tl.arange(0, BLOCK_H)[:, None, None]
    s = position + tl.arange(0, BLOCK_S)[None, :, None]
    inside = (h < heads) & (s < positions)
    h = h.to(tl.int64)
    s = s.to(tl.int64)
    x_row = x_ptr + batch * x_stride_b + h * x_stride_h + s * x_stride_s
    y_row = y_ptr + batch * y_stride_b + h * y_stride_h + s * y_stride_s
    cos_row = cos_ptr + s * cos_stride_s
    sin_row = sin_ptr + s * sin_stride_s
    column = tl.arange(0, BLOCK_R)[None, None, :]
    kind = y_ptr.dtype.element_ty
    if INTERLEAVED:
        valid = inside & (column < R)
        angle = (s < positions) & (column < R)
        x = tl.load(x_row + column, mask=valid, other=0.0).to(tl.float32)
        cos = tl.load(cos_row + column, mask=angle, other=0.0).to(tl.float32)
        sin = tl.load(sin_row + column, mask=angle, other=0.0).to(tl.float32)
        xi, xj = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_S, BLOCK_R // 2, 2)))
        cos_i, cos_j = tl.split(tl.reshape(cos, (1, BLOCK_S, BLOCK_R // 2, 2)))
        sin_i, sin_j = tl.split(tl.reshape(sin, (1, BLOCK_S, BLOCK_R // 2, 2)))
        yi, yj = _rotate_pairs(xi, xj, cos_i, cos_j, sin_i, sin_j, TRANSPOSED)
        y = tl.reshape(tl.join(yi, yj), (BLOCK_H, BLOCK_S, BLOCK_R))
        tl.store(y_row + column, y.to(kind), mask=valid)
    else:
        half: tl.constexpr = R // 2
        valid = inside & (column < half)
        angle = (s < positions) & (column < half)
        xi = tl.load(x_row + column, mask=valid, other=0.0).to(tl.float32)
        xj = tl.load(x_row + half + column, mask=valid, other=0.0).to(tl.float32)
        cos_i = tl.load(cos_row + column, mask=angle, other=0.0).to(tl.float32)
        cos_j = tl.load(cos_row + half + column, mask=angle, other=0.0).to(tl.float32)
        sin_i = tl.load(sin_row + column, mask=angle, other=0.0).to(tl.float32)
        sin_j = tl.load(sin_row + half + column, mask=angle, other=0.0).to(tl.float32)
        yi, yj = _rotate_pairs(xi, xj, cos_i, cos_j, sin_i, sin_j, TRANSPOSED)
        tl.store(y_row + column, yi.to(kind), mask=valid)
        tl.store(y_row + half + column, yj.to(kind), mask=valid)
    if BLOCK_REST > 0:
        rest = R + tl.arange(0, BLOCK_REST)[None, None, :]
        for index in range(0, BLOCK_H, COPIED_H):
            one = head + index + tl.arange(0, COPIED_H)[:, None, None]
            copy = (one < heads) & (s < positions) & (rest < D)
            one = one.to(tl.int64)
            x_rest = x_ptr + batch * x_stride_b + one * x_stride_h + s * x_stride_s + rest
            y_rest = y_ptr + batch * y_stride_b + one * y_stride_h + s * y_stride_s + rest
            tl.store(y_rest, tl.load(x_rest, mask=copy, other=0.0), mask=copy)


# Floor: x is read and y written once, 4 D bytes a row in 16 bits, and the 2 R angles of a position
# once for its Hq + Hk heads; two multiply-adds per element. So it is bound by memory. Tiling: a
# program takes a block of heads of q or of k at a block of positions, and the programs of one block
# of positions are neighbours, so that its angles stay in cache.
@triton.jit(do_not_specialize=["q_heads", "k_heads", "positions"])
def _rope_kernel(
    q_ptr,  # [B, Hq, S, D]
    q_out_ptr,
    k_ptr,  # [B, Hk, S, D], or None
    k_out_ptr,
    cos_ptr,  # [B or 1, S, R]
    sin_ptr,
    q_heads,
    k_heads,
    positions,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    q_out_stride_b,
    q_out_stride_h,
    q_out_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    k_out_stride_b,
    k_out_stride_h,
    k_out_stride_s,
    cos_stride_b,  # 0 where the angles are shared
    cos_stride_s,
    sin_stride_b,
    sin_stride_s,
    D: tl.constexpr,
    R: tl.constexpr,
    HAS_K: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    COPIED_H: tl.constexpr,
):
    q_blocks = tl.cdiv(q_heads, BLOCK_H)
    head_blocks = q_blocks
    if HAS_K:
        head_blocks += tl.cdiv(k_heads, BLOCK_H)
    program = tl.program_id(0)
    head_block = program % head_blocks
    program = program // head_blocks
    position_blocks = tl.cdiv(positions, BLOCK_S)
    position = program % position_blocks * BLOCK_S
    batch = (program // position_blocks).to(tl.int64)
    cos_ptr += batch * cos_stride_b
    sin_ptr += batch * sin_stride_b
    if head_block < q_blocks:
        _rope_heads(
            q_ptr, q_out_ptr, cos_ptr, sin_ptr, batch, head_block * BLOCK_H, q_heads, position,
            positions, q_stride_b, q_stride_h, q_stride_s, q_out_stride_b, q_out_stride_h,
            q_out_stride_s, cos_stride_s, sin_stride_s, D, R, INTERLEAVED, TRANSPOSED, BLOCK_H,
            BLOCK_S, BLOCK_R, BLOCK_REST, COPIED_H,
        )  # fmt: skip
    elif HAS_K:
        _rope_heads(
            k_ptr, k_out_ptr, cos_ptr, sin_ptr, batch, (head_block - q_blocks) * BLOCK_H, k_heads,
            position, positions, k_stride_b, k_stride_h, k_stride_s, k_out_stride_b,
            k_out_stride_h, k_out_stride_s, cos_stride_s, sin_stride_s, D, R, INTERLEAVED,
            TRANSPOSED, BLOCK_H, BLOCK_S, BLOCK_R, BLOCK_REST, COPIED_H,
        )  # fmt: skip


def rope_forward(
    q: Tensor | None,  # [B, Hq, S, D] fp32 / bf16 / fp16, unit stride in D
    k: Tensor | None,  # [B, Hk, S, D]
    cos: Tensor,  # [B or 1, S, R] fp32 / bf16 / fp16, unit stride in R
    sin: Tensor,
    *,
    interleaved: bool,
    q_out: Tensor | None,  # as q, any other strides
    k_out: Tensor | None,
) -> None:
    """Writes the rotated q and k into q_out and k_out; one launch where their dtypes agree."""
    _rotate([(q, q_out), (k, k_out)], cos, sin, interleaved, transposed=False)


def rope_backward(
    dq: Tensor | None,
    dk: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool,
    dq_out: Tensor | None,
    dk_out: Tensor | None,
) -> None:
    """Writes the gradients by q and k into dq_out and dk_out: the transpose of the forward."""
    _rotate([(dq, dq_out), (dk, dk_out)], cos, sin, interleaved, transposed=True)


def _rotate(
    pairs: list[tuple[Tensor | None, Tensor | None]],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    *,
    transposed: bool,
) -> None:
    given = [(x, y) for x, y in pairs if x is not None and y is not None and x.numel()]
    if len(given) == 2 and given[0][0].dtype != given[1][0].dtype:
        for pair in given:
            _launch([pair], cos, sin, interleaved, transposed)
    elif given:
        _launch(given, cos, sin, interleaved, transposed)


def _launch(
    given: list[tuple[Tensor, Tensor]],  # one or two, of one dtype, not empty
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    transposed: bool,
) -> None:
    (q, q_out), (k, k_out) = given[0], given[-1]
    has_k = len(given) == 2
    batch, q_heads, positions, features = q.shape
    rotary = cos.shape[-1]
    k_heads = k.shape[1] if has_k else 0
    block_r = next_power_of_2(rotary if interleaved else rotary // 2)
    block_rest = next_power_of_2(features - rotary) if features > rotary else 0
    vectors = divide_up(block_r * q.element_size(), _VECTOR_BYTES)
    block_s = min(max(_THREADS // vectors, 1), next_power_of_2(positions))
    rest_bytes = block_rest * q.element_size()  # of a row
    if rest_bytes:
        block_s = min(block_s, max(_COPIED_BYTES // rest_bytes, 1))
    copied_h = _COPIED_BYTES // max(block_s * rest_bytes, 1)
    head_blocks = divide_up(q_heads, _BLOCK_H) + divide_up(k_heads, _BLOCK_H)
    grid = (batch * divide_up(positions, block_s) * head_blocks,)
    tables: list[Any] = [
        stride
        for table in (cos, sin)
        for stride in (table.stride(0) if table.shape[0] > 1 else 0, table.stride(1))
    ]
    with launch_device(q):
        launch(
            _rope_kernel,
            grid,
            q,
            q_out,
            k if has_k else None,
            k_out if has_k else None,
            cos,
            sin,
            q_heads,
            k_heads,
            positions,
            *q.stride()[:3],
            *q_out.stride()[:3],
            *(k.stride()[:3] if has_k else (0, 0, 0)),
            *(k_out.stride()[:3] if has_k else (0, 0, 0)),
            *tables,
            D=features,
            R=rotary,
            HAS_K=has_k,
            INTERLEAVED=interleaved,
            TRANSPOSED=transposed,
            BLOCK_H=_BLOCK_H,
            BLOCK_S=block_s,
            BLOCK_R=block_r,
            BLOCK_REST=block_rest,
            COPIED_H=min(max(copied_h, 1), _BLOCK_H),
            num_warps=_THREADS // 32,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )

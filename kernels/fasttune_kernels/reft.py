"""Edits of listed rows within a low-rank subspace: gather, into the subspace, back, scatter.

Legend: M rows of h, H features, P entries of the list, R rank. h [M, H], rotation and source [R,
H], z, d, dz, dd [P, R] in fp32. Entry p of the list is a row of h, or none where it is negative.

    reft_forward    z = x source^T + bias, d = act(z) - x rotation^T, y = keep s (x + d rotation)
    reft_backward   with g = keep s dy: dd = g rotation^T, dz = dd act'(z),
                    dh = g + dz source - dd rotation

One program holds a block of the list and walks over its features twice; the second walk finds them
in L2. The gradients of rotation and source are the weight gradients of `lora_linear`.

Precision: products accumulate in fp32 and no operand is rounded before one, see `dot_exact`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate_with_slope
from .dot_exact import dot_exact
from .launch import launch
from .lora_tables import arithmetic_of, has_tensor_cores
from .philox import keep_mask, load_philox_key
from .tables import MAX_REGISTERS, Gpu, Tile, divide_up, gpu_of, launch_device, next_power_of_2


@triton.jit
def _listed(rows_ptr, entries, P, M):
    """-> the rows of the entries, and which of them there are."""
    inside = entries < P
    rows = entries
    if rows_ptr is not None:
        rows = tl.load(rows_ptr + entries, mask=inside, other=-1)
    return rows, inside & (rows >= 0) & (rows < M)


@triton.jit
def _dropped(
    x, entries, k0, key0, key1, threshold, scale, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr
):
    """keep * scale x; the place in the list is the row of the mask."""
    keep = keep_mask(entries, k0, key0, key1, tl.full((), 0, tl.int32), threshold, BLOCK_P, BLOCK_H)
    return tl.where(keep, x * scale, 0.0)


# Floor: read P H of h twice (the second time from L2), write P H of y and of x; R and W, 2 R H,
# come from L2 for every program. 6 P R H operations. With the few entries of a batch (a dozen a
# sequence) there are fewer programs than multiprocessors and latency binds: small blocks of the
# list, long ones of features, two stages deep.
@triton.jit(do_not_specialize=["M", "P", "threshold"])
def _reft_forward_kernel(
    h_ptr,  # [M, H], columns adjacent
    rows_ptr,  # [P] int64 or None
    rotation_ptr,  # [R, H] contiguous
    source_ptr,  # [R, H] contiguous
    bias_ptr,  # [R] or None
    y_ptr,  # [M, H], columns adjacent
    x_ptr,  # [P, H] contiguous or None
    z_ptr,  # [P, R] fp32
    d_ptr,  # [P, R] fp32
    seed_ptr,  # 0-d int64 or None
    threshold,
    scale,
    M,
    P,
    H,
    stride_hm: tl.int64,
    stride_ym: tl.int64,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    entries = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    ranks = tl.arange(0, BLOCK_R)
    inside_r = ranks < R
    rows, there = _listed(rows_ptr, entries, P, M)
    h_rows = h_ptr + rows[:, None] * stride_hm
    z = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.float32)
    t = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.float32)
    for k0 in range(0, H, BLOCK_H):
        k = k0 + tl.arange(0, BLOCK_H)
        inside_k = k < H
        x = tl.load(h_rows + k[None, :], mask=there[:, None] & inside_k[None, :], other=0.0)
        if x_ptr is not None:
            x_there = (entries < P)[:, None] & inside_k[None, :]
            tl.store(x_ptr + entries[:, None] * H + k[None, :], x, mask=x_there)
        of_line = ranks.to(tl.int64)[None, :] * H + k[:, None]
        inside = inside_r[None, :] & inside_k[:, None]
        z = dot_exact(x, tl.load(source_ptr + of_line, mask=inside, other=0.0), z, TENSOR_CORES)
        if DIFFERENCE:
            line = tl.load(rotation_ptr + of_line, mask=inside, other=0.0)
            t = dot_exact(x, line, t, TENSOR_CORES)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + ranks, mask=inside_r, other=0.0).to(tl.float32)[None, :]
    z = tl.where(there[:, None] & inside_r[None, :], z, 0.0)
    d = z
    if ACTIVATION != "identity":
        d, _ = activate_with_slope(z, ACTIVATION)
    d = tl.where(there[:, None] & inside_r[None, :], d - t, 0.0)
    of_sum = entries[:, None] * R + ranks[None, :]
    listed = (entries < P)[:, None] & inside_r[None, :]
    tl.store(z_ptr + of_sum, z, mask=listed)
    tl.store(d_ptr + of_sum, d, mask=listed)
    if HAS_DROPOUT:
        key0, key1 = load_philox_key(seed_ptr)
    y_rows = y_ptr + rows[:, None] * stride_ym
    for k0 in range(0, H, BLOCK_H):
        k = k0 + tl.arange(0, BLOCK_H)
        inside_k = k < H
        inside = there[:, None] & inside_k[None, :]
        y = tl.load(h_rows + k[None, :], mask=inside, other=0.0).to(tl.float32)
        line = tl.load(
            rotation_ptr + ranks.to(tl.int64)[:, None] * H + k[None, :],
            mask=inside_r[:, None] & inside_k[None, :],
            other=0.0,
        )
        y = dot_exact(d, line, y, TENSOR_CORES)
        if HAS_DROPOUT:
            y = _dropped(y, entries, k0, key0, key1, threshold, scale, BLOCK_P, BLOCK_H)
        tl.store(y_rows + k[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


# Floor: as the forward, with dy for h; without dh the second walk falls away.
@triton.jit(do_not_specialize=["M", "P", "threshold"])
def _reft_backward_kernel(
    dy_ptr,  # [M, H], columns adjacent
    rows_ptr,  # [P] int64 or None
    rotation_ptr,  # [R, H] contiguous
    source_ptr,  # [R, H] contiguous
    z_ptr,  # [P, R] fp32
    dh_ptr,  # [M, H], columns adjacent, or None
    g_ptr,  # [P, H] contiguous or None
    dz_ptr,  # [P, R] fp32
    dd_ptr,  # [P, R] fp32
    seed_ptr,  # 0-d int64 or None
    threshold,
    scale,
    M,
    P,
    H,
    stride_dym: tl.int64,
    stride_dhm,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    entries = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    ranks = tl.arange(0, BLOCK_R)
    inside_r = ranks < R
    rows, there = _listed(rows_ptr, entries, P, M)
    if HAS_DROPOUT:
        key0, key1 = load_philox_key(seed_ptr)
    dy_rows = dy_ptr + rows[:, None] * stride_dym
    dd = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.float32)
    for k0 in range(0, H, BLOCK_H):
        k = k0 + tl.arange(0, BLOCK_H)
        inside_k = k < H
        g = tl.load(dy_rows + k[None, :], mask=there[:, None] & inside_k[None, :], other=0.0)
        if g_ptr is not None:
            g_there = (entries < P)[:, None] & inside_k[None, :]
            tl.store(g_ptr + entries[:, None] * H + k[None, :], g, mask=g_there)
        if HAS_DROPOUT:  # the scale would round a 16-bit g: it goes to the sums
            g = _dropped(g, entries, k0, key0, key1, threshold, 1.0, BLOCK_P, BLOCK_H).to(g.dtype)
        line = tl.load(
            rotation_ptr + ranks.to(tl.int64)[None, :] * H + k[:, None],
            mask=inside_r[None, :] & inside_k[:, None],
            other=0.0,
        )
        dd = dot_exact(g, line, dd, TENSOR_CORES)
    dd = dd * scale
    of_sum = entries[:, None] * R + ranks[None, :]
    listed = (entries < P)[:, None] & inside_r[None, :]
    dz = dd
    if ACTIVATION != "identity":
        z = tl.load(z_ptr + of_sum, mask=listed, other=0.0)
        _, slope = activate_with_slope(z, ACTIVATION)
        dz = dd * slope
    tl.store(dz_ptr + of_sum, dz, mask=listed)
    tl.store(dd_ptr + of_sum, dd, mask=listed)
    if dh_ptr is not None:
        dh_rows = dh_ptr + rows[:, None] * stride_dhm
        for k0 in range(0, H, BLOCK_H):
            k = k0 + tl.arange(0, BLOCK_H)
            inside_k = k < H
            inside = there[:, None] & inside_k[None, :]
            dh = tl.load(dy_rows + k[None, :], mask=inside, other=0.0).to(tl.float32)
            if HAS_DROPOUT:
                dh = _dropped(dh, entries, k0, key0, key1, threshold, scale, BLOCK_P, BLOCK_H)
            of_line = ranks.to(tl.int64)[:, None] * H + k[None, :]
            inside_line = inside_r[:, None] & inside_k[None, :]
            line = tl.load(source_ptr + of_line, mask=inside_line, other=0.0)
            dh = dot_exact(dz, line, dh, TENSOR_CORES)
            if DIFFERENCE:
                line = tl.load(rotation_ptr + of_line, mask=inside_line, other=0.0)
                dh = dot_exact(-dd, line, dh, TENSOR_CORES)
            tl.store(dh_rows + k[None, :], dh.to(dh_ptr.dtype.element_ty), mask=inside)


def _tile(gpu: Gpu, arithmetic: str, entries: int, block_r: int) -> Tile:
    """[entries of the list, features per step]: more entries only where all programs are busy."""
    if arithmetic == "fma":
        narrow = gpu.capability < 80 and block_r > 64
        return Tile(16, 16 if narrow else 32, 4 if block_r <= 32 else 8, 2)
    if block_r > 64:
        return Tile(16, 32, 4, 2)
    block_p = 32 if entries >= 64 * gpu.multiprocessors and block_r <= 32 else 16
    return Tile(block_p, 64 if block_r > 16 or arithmetic == "terms6" else 128, 4, 2)


def _options(
    h: Tensor, entries: int, rotation: Tensor, difference: bool, activation: str
) -> dict[str, Any]:
    gpu, rank = gpu_of(h), rotation.shape[0]
    block_r = max(16, next_power_of_2(rank))
    tile = _tile(gpu, arithmetic_of(gpu, h.dtype, rotation.dtype), entries, block_r)
    return {
        "R": rank,
        "BLOCK_R": block_r,
        "BLOCK_P": tile.rows,
        "BLOCK_H": tile.columns,
        "DIFFERENCE": difference,
        "ACTIVATION": activation,
        "TENSOR_CORES": has_tensor_cores(gpu),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": MAX_REGISTERS,
        "enable_fp_fusion": True,
    }


def reft_forward(
    h: Tensor,  # [M, H], unit column stride
    rows: Tensor | None,  # [P] int64
    rotation: Tensor,  # [R, H]
    source: Tensor,  # [R, H]
    bias: Tensor | None,  # [R]
    *,
    difference: bool,
    activation: str,
    scale: float,
    seed: Tensor | None,  # 0-d int64; unused if threshold is 0
    threshold: int,
    y: Tensor,  # [M, H], unit column stride; may be h
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Writes the listed rows of y; -> those of h [P, H] (None if rows is None), z and d [P, R]
    fp32, all zero where the list names no row.
    """
    m, k = h.shape
    entries, rank = m if rows is None else rows.shape[0], rotation.shape[0]
    z, d = (h.new_empty((entries, rank), dtype=torch.float32) for _ in range(2))
    x = None if rows is None else h.new_empty((entries, k))
    if entries == 0:
        return x, z, d
    options = _options(h, entries, rotation, difference, activation)
    with launch_device(h):
        launch(
            _reft_forward_kernel,
            (divide_up(entries, options["BLOCK_P"]),),
            h,
            None if rows is None else rows.contiguous(),
            rotation.contiguous(),
            source.contiguous(),
            bias,
            y,
            x,
            z,
            d,
            seed if threshold > 0 else None,
            threshold,
            scale,
            m,
            entries,
            k,
            h.stride(0),
            y.stride(0),
            HAS_DROPOUT=threshold > 0,
            **options,
        )
    return x, z, d


def reft_backward(
    dy: Tensor,  # [M, H], unit column stride
    rows: Tensor | None,  # [P] int64
    rotation: Tensor,  # [R, H]
    source: Tensor,  # [R, H]
    z: Tensor,  # [P, R] fp32
    *,
    difference: bool,
    activation: str,
    scale: float,
    seed: Tensor | None,  # 0-d int64; unused if threshold is 0
    threshold: int,
    dh: Tensor | None,  # [M, H], unit column stride
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Writes the listed rows of dh; -> those of dy [P, H], without the mask (None if rows is None),
    dz and dd [P, R] fp32, all zero where the list names no row.
    """
    m, k = dy.shape
    entries, rank = m if rows is None else rows.shape[0], rotation.shape[0]
    dz, dd = (dy.new_empty((entries, rank), dtype=torch.float32) for _ in range(2))
    g = None if rows is None else dy.new_empty((entries, k))
    if entries == 0:
        return g, dz, dd
    options = _options(dy, entries, rotation, difference, activation)
    with launch_device(dy):
        launch(
            _reft_backward_kernel,
            (divide_up(entries, options["BLOCK_P"]),),
            dy,
            None if rows is None else rows.contiguous(),
            rotation.contiguous(),
            source.contiguous(),
            z,
            dh,
            g,
            dz,
            dd,
            seed if threshold > 0 else None,
            threshold,
            scale,
            m,
            entries,
            k,
            dy.stride(0),
            0 if dh is None else dh.stride(0),
            HAS_DROPOUT=threshold > 0,
            **options,
        )
    return g, dz, dd

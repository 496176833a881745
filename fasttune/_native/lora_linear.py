"""The products around a LoRA branch, in C++."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttune._native._extension import cpu, fp32, threads
from fasttune._native.base_product import Product, multiply

MAX_RANK = 256  # accumulators of csrc/cpu/lora_linear.cpp
LANES = 16  # kLanes of csrc/cpu/kernels.h
MASK_SPAN = 64  # kMaskSpan of csrc/cpu/keep_mask.h
VENDOR_RANK = 64


class Reduced(NamedTuple):
    """How the kernel of a product makes t of its x: scale (x * keep) panel."""

    panel: Tensor  # [K, padded R] fp32
    scale: float
    dropout: Any


def dropout_of(seed: Tensor | None, threshold: int, branch: int, row_offset: int) -> Any:
    if threshold == 0:
        return _keep_all()
    bits = 0 if seed is None else int(seed.item()) & 0xFFFFFFFFFFFFFFFF
    return cpu().Dropout(bits, threshold, branch, row_offset)


@lru_cache(maxsize=1)
def _keep_all() -> Any:
    return cpu().Dropout(0, 0, 0, 0)


def _by_vendor(wide: Tensor, rank: int, threshold: int = 0) -> bool:
    """Whether torch makes a product with ``wide``: in fp32 from this rank on its products (MKL)
    take 0.3 to 1.1 of the time of ours on a Xeon with AMX. On an AMD EPYC ours are as fast.
    """
    if wide.dtype != torch.float32 or rank < VENDOR_RANK or threshold:
        return False
    return bool(cpu().isa_name() == "amx")


def _draw(dropout: Any, rows: int, columns: int) -> Tensor:
    """Which of [rows, columns] are kept, a bit each, where two kernels would draw them."""
    words = torch.empty(rows, -(-columns // MASK_SPAN), dtype=torch.int64)
    cpu().draw(dropout, rows, columns, words.data_ptr(), threads())
    return words


def padded_rank(rank: int) -> int:
    return -(-rank // LANES) * LANES


def _padded(x: Tensor, columns: int) -> Tensor:
    """x [M, N] as fp32 with zero columns up to ``columns``."""
    if x.shape[1] == columns:
        return fp32(x)
    out = torch.zeros(x.shape[0], columns, dtype=torch.float32)
    out[:, : x.shape[1]] = x.detach()
    return out


def _transposed(x: Tensor, columns: int) -> Tensor:
    """``_padded`` of x^T; torch's own copy takes 1.4 to 5 times as long."""
    if x.shape[1] > 1 and x.stride(1) != 1:  # a transposed view: x^T lies as it is read
        return _padded(x.t(), columns)
    x = x.resolve_neg()
    out = torch.empty(x.shape[1], columns, dtype=torch.float32)
    cpu().transpose(x, out.data_ptr(), columns, threads())
    return out


def panel_of(a: Tensor) -> Tensor:
    """A [R, K] as lora_reduce takes it: [K, padded R] fp32."""
    return _transposed(a, padded_rank(a.shape[0]))


def _scale(scale: float, scale_tensor: Tensor | None) -> float:
    return scale if scale_tensor is None else scale * float(scale_tensor)


def lora_down(
    x: Tensor,  # [M, K]
    a: Tensor,  # [R, K]
    scale: float,
    scale_tensor: Tensor | None,
    *,
    seed: Tensor | None,
    threshold: int,
    branch: int,
    row_offset: int = 0,
) -> Tensor:
    """t [M, R] fp32 = scale (x * keep) A^T."""
    rank = a.shape[0]
    if _by_vendor(x, rank, threshold):
        return torch.mm(x, fp32(a).t()).mul_(_scale(scale, scale_tensor))
    t = torch.empty(x.shape[0], rank, dtype=torch.float32)
    panel = panel_of(a)
    dropout = dropout_of(seed, threshold, branch, row_offset)
    factor = _scale(scale, scale_tensor)
    cpu().lora_reduce(x, panel.data_ptr(), rank, factor, dropout, t.data_ptr(), threads())
    return t


def lora_layer(
    product: Product,  # x [M, K] and W^T [K, N], of which takes_product is true
    a: Tensor,  # [R, K], R at most MAX_RANK
    b: Tensor,  # [N, R]
    bias: Tensor | None,  # [N]
    scale: float,
    scale_tensor: Tensor | None,
    *,
    seed: Tensor | None,
    threshold: int,
    branch: int,
    out_dtype: torch.dtype,
    kept: Tensor | None = None,  # [M, N], fp32 or bf16
    product_scale: Tensor | None = None,  # [N] fp32, given with ``kept``
) -> tuple[Tensor, Tensor]:
    """lora_down and lora_up in one pass over x: y [M, N], rounded once, and t [M, R] fp32. The
    product goes into ``kept`` and is scaled, if given.
    """
    x, w = product
    out = torch.empty(x.shape[0], w.shape[1], dtype=out_dtype)
    dropout = dropout_of(seed, threshold, branch, 0)
    reduced = Reduced(panel_of(a), _scale(scale, scale_tensor), dropout)
    factor = _transposed(b, b.shape[0])
    t = torch.empty(x.shape[0], a.shape[0], dtype=torch.float32)
    _add_product(
        product, t, factor, bias, _keep_all(), out,
        reduced=reduced, kept=kept, product_scale=product_scale,
    )  # fmt: skip
    return out, t


def lora_up(
    t: Tensor,  # [M, R] fp32
    b: Tensor,  # [N, R]
    bias: Tensor | None,  # [N]
    *,
    out_dtype: torch.dtype,
    addend: Tensor | None = None,  # [M, N], fp32 or of the output's dtype
    addend_scale: Tensor | None = None,  # [N] fp32
    product: Product | None = None,  # of which takes_product is true
    out: Tensor | None = None,  # [M, N]
) -> Tensor:
    """y0 [M, N] = addend addend_scale + bias + t B^T + x w, rounded once; written into ``out`` if
    given. R may be 0.
    """
    if out is None:
        out = torch.empty(t.shape[0], b.shape[0], dtype=out_dtype)
    plain = product is None and bias is None and addend_scale is None
    if addend is not None and plain and _by_vendor(out, t.shape[1]):
        return torch.addmm(addend, t, fp32(b).t(), out=out)
    panel = _transposed(b, b.shape[0])
    if product is not None:
        assert addend_scale is None
        _add_product(product, t, panel, bias, _keep_all(), out, addend)
    else:
        _expand(t, panel, bias, _keep_all(), out, addend, addend_scale)
    return out


def drop(
    x: Tensor,  # [M, K]
    *,
    seed: Tensor,
    threshold: int,
    branch: int,
    row_offset: int = 0,
) -> Tensor:
    """x * keep [M, K], not scaled."""
    out = torch.empty(x.shape, dtype=x.dtype)
    dropout = dropout_of(seed, threshold, branch, row_offset)
    cpu().drop(x, dropout, out, threads())
    return out


def lora_up_backward(
    dy: Tensor,  # [M, N]
    t: Tensor | None,  # [M, R] fp32
    b: Tensor,  # [N, R]
    scale: float,
    scale_tensor: Tensor | None,
    *,
    need_d: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """d [M, R] fp32 = scale dy B, db [N, R] = dy^T t; None where not needed."""
    d = db = None
    none, rank = _keep_all(), b.shape[1]
    if _by_vendor(dy, rank):
        if need_d:
            d = torch.mm(dy, fp32(b)).mul_(_scale(scale, scale_tensor))
        if need_db:
            assert t is not None
            db = torch.mm(dy.t(), t).to(b.dtype)
        return d, db
    if need_d:
        d = torch.empty(dy.shape[0], rank, dtype=torch.float32)
        panel = _padded(b, padded_rank(rank))
        factor = _scale(scale, scale_tensor)
        cpu().lora_reduce(dy, panel.data_ptr(), rank, factor, none, d.data_ptr(), threads())
    if need_db:
        assert t is not None
        db = torch.empty_like(b, memory_format=torch.contiguous_format)
        padded = _padded(t, padded_rank(rank))
        cpu().lora_outer(dy, padded.data_ptr(), rank, none, db, False, threads())
    return d, db


def lora_down_backward(
    d: Tensor | None,  # [M, R] fp32
    a: Tensor,  # [R, K]
    x: Tensor | None,  # [M, K]
    *,
    seed: Tensor | None,
    threshold: int,
    branch: int,
    row_offset: int = 0,
    dx_dtype: torch.dtype,
    need_dx: bool,
    need_da: bool,
    addend: Tensor | None = None,  # [M, K], fp32 or of `dx_dtype`
    product: Product | None = None,  # of which takes_product is true
    up: tuple[Tensor, float, Tensor | None] | None = None,  # B [N, R] and its scales
) -> tuple[Tensor | None, Tensor | None]:
    """dx0 [M, K] = addend + keep * (d A) + x w, da [R, K] = d^T (x * keep); None where not needed.
    With ``up`` in place of ``d``, lora_up_backward's d of the left factor of the product, made in
    the same pass.
    """
    dx = da = reduced = None
    dropout = dropout_of(seed, threshold, branch, row_offset)
    if d is None and up is not None:
        assert product is not None
        factor, scale, scale_tensor = up
        panel = _padded(factor, padded_rank(factor.shape[1]))
        reduced = Reduced(panel, _scale(scale, scale_tensor), _keep_all())
        d = torch.empty(product[0].shape[0], factor.shape[1], dtype=torch.float32)
    if threshold and need_dx and (need_da or product is not None):
        assert d is not None
        words = _draw(dropout, d.shape[0], a.shape[1])
        dropout = dropout.drawn(words.data_ptr(), words.shape[1])
    if need_dx:
        assert d is not None
        panel_of_a = fp32(a)
        dx = torch.empty(d.shape[0], a.shape[1], dtype=dx_dtype)
        if _by_vendor(dx, a.shape[0], threshold) and addend is not None and product is None:
            torch.addmm(addend, d, panel_of_a, out=dx)
        elif product is not None:
            _add_product(product, d, panel_of_a, None, dropout, dx, addend, reduced=reduced)
        else:
            _expand(d, panel_of_a, None, dropout, dx, addend)
    if need_da and x is not None and d is not None and _by_vendor(x, a.shape[0], threshold):
        da = torch.mm(d.t(), x).to(a.dtype)
    elif need_da:
        assert d is not None and x is not None
        da = torch.empty_like(a, memory_format=torch.contiguous_format)
        padded = _padded(d, padded_rank(a.shape[0]))
        cpu().lora_outer(
            x,
            padded.data_ptr(),
            a.shape[0],
            dropout,
            da,
            True,
            threads(),
        )
    return dx, da


def _expand(
    t: Tensor,
    panel: Tensor,
    bias: Tensor | None,
    dropout: Any,
    out: Tensor,
    addend: Tensor | None,
    addend_scale: Tensor | None = None,
) -> None:
    _check_addend(addend, out)
    bias_fp32 = None if bias is None else fp32(bias)
    cpu().lora_expand(
        t.data_ptr(),
        panel.data_ptr(),
        t.shape[1],
        addend,
        0 if addend_scale is None else addend_scale.data_ptr(),
        0 if bias_fp32 is None else bias_fp32.data_ptr(),
        dropout,
        out,
        threads(),
    )


def _add_product(
    product: Product,
    t: Tensor,
    panel: Tensor,
    bias: Tensor | None,
    dropout: Any,
    out: Tensor,
    addend: Tensor | None = None,
    *,
    reduced: Reduced | None = None,  # t is written
    kept: Tensor | None = None,
    product_scale: Tensor | None = None,
) -> None:
    """What _expand adds, and the product, in one pass; ``kept`` gets the product as it is."""
    _check_addend(addend, out)
    bias_fp32 = None if bias is None else fp32(bias)
    reduction = None
    if reduced is not None:
        # The names of the arguments stay bound: they may be all that keeps their tensors alive.
        own = reduced.panel.data_ptr()
        reduction = cpu().Reduction(own, reduced.scale, reduced.dropout, t.data_ptr())
    rows = product[0].shape[0]
    addresses = (panel.data_ptr(), t.shape[1], 0 if bias_fp32 is None else bias_fp32.data_ptr())
    run = cpu().Run(0, rows, t.data_ptr(), reduction, *addresses, dropout)
    scale = 0 if product_scale is None else product_scale.data_ptr()
    multiply(product, [run], out, addend, kept, scale)


def _check_addend(addend: Tensor | None, out: Tensor) -> None:
    if addend is not None and addend.dtype not in (torch.float32, out.dtype):
        raise TypeError(f"addend: expected torch.float32 or {out.dtype}, got {addend.dtype}")

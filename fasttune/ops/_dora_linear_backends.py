"""The registered ops of dora_linear: schema, fake and one implementation per backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fasttune import _native, _registry
from fasttune.ops import _dora_linear_reference, _dropout, _gemm, _support
from fasttune.ops._arguments import accumulator

# fp32 products of two matrices whose columns are summed, at a time.
_BLOCK_BYTES = 4 << 20
_FEW_ROWS = 64


def _forward_fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    a, norm, (dtype, base_dtype, need_base) = rest[1], rest[4], rest[-3:]
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    t = x.new_empty(x.shape[0], a.shape[0], dtype=accumulator(dtype))
    base = x.new_empty(y.shape if need_base else (0,), dtype=base_dtype)
    norms = weight.shape[0] if norm is None else 0
    return y, t, base, weight.new_empty(norms, dtype=accumulator(weight.dtype))


def _backward_fake(dy: Tensor, x: Any, weight: Tensor, *rest: Any) -> list[Tensor]:
    a, b, magnitude = rest[:3]
    x_dtype, needs = rest[-2:]
    made: tuple[Callable[[], Tensor], ...] = (
        lambda: dy.new_empty(dy.shape[0], weight.shape[1], dtype=x_dtype),
        lambda: torch.empty_like(weight, memory_format=torch.contiguous_format),
        lambda: dy.new_empty(dy.shape[1], dtype=accumulator(dy.dtype)),
        lambda: torch.empty_like(a),
        lambda: torch.empty_like(b),
        lambda: torch.empty_like(magnitude),
    )
    return [make() for make, flag in zip(made, needs, strict=True) if flag]


FORWARD = _registry.define(
    "dora_linear_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor magnitude, Tensor? norm, "
    "Tensor? seed, float scaling, int threshold, ScalarType compute_dtype, ScalarType base_dtype, "
    "bool need_base) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
BACKWARD = _registry.define(
    "dora_linear_bwd",
    "(Tensor dy, Tensor? x, Tensor weight, Tensor a, Tensor b, Tensor magnitude, Tensor norm, "
    "Tensor? t, Tensor? base, Tensor? seed, float scaling, int threshold, ScalarType x_dtype, "
    "bool[] needs) -> Tensor[]",
    _backward_fake,
)


def _product(prims: ModuleType, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x W^T in ``dtype``, or in fp32 in a scratch buffer where products go through fp32."""
    if prims is _native and _gemm.through_fp32(x.device, dtype):
        return _gemm.linear_fp32(x, weight)
    return torch.mm(x.to(dtype), weight.to(dtype).t())


def _product_in_fp32(x: Tensor, weight: Tensor, keep: bool) -> Tensor:
    """x W^T in fp32, of operands as stored; it may lie in a scratch buffer unless ``keep``."""
    if x.is_cpu:
        return _product_in_fp32_on_cpu(x, weight, keep)
    if x.dtype != weight.dtype or x.dtype == torch.float32:
        return torch.mm(x.to(torch.float32), weight.to(torch.float32).t())
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def _product_in_fp32_on_cpu(x: Tensor, weight: Tensor, keep: bool) -> Tensor:
    if _native.takes_product(x, weight.t(), deep=True):
        return _native.deep_product(x, weight.t())
    # For a few rows converting W takes longer than anything: they are a down-projection of W.
    few = 0 < x.shape[0] <= _FEW_ROWS and x.shape[1] > 0
    if few and weight.dtype != torch.float32 and weight.stride(1) == 1 and not weight.is_neg():
        none: dict[str, Any] = {"seed": None, "threshold": 0, "branch": 0}
        return _native.lora_down(weight, x, 1.0, None, **none).t().contiguous()
    product = _gemm.linear_fp32(x, weight)
    return product.clone() if keep else product


def _product_backward(prims: ModuleType, dy: Tensor, weight: Tensor) -> Tensor:
    """dy W, likewise."""
    if prims is _native and _gemm.through_fp32(dy.device, dy.dtype):
        return _gemm.linear_backward_fp32(dy, weight)
    return torch.mm(dy, weight.to(dy.dtype))


def _weight_norm(prims: ModuleType, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The norm; no copy of the weight is made where its rows lie as the kernels read them."""
    if prims is _native and _native.takes_row_norms(weight, a):
        return _native.row_norms(weight, a, b, scale)[0]
    if prims is _native or weight.stride(1) != 1 or weight.numel() == 0:
        return _dora_linear_reference.weight_norm(weight, a, b, scale)
    inner, outer = a.to(torch.float32), b.to(torch.float32)
    cross = prims.lora_down(weight, a, 1.0, None, seed=None, threshold=0, branch=0)
    through = torch.addmm(cross, outer, torch.mm(inner, inner.t()), beta=2.0, alpha=scale)
    products = torch.mul(outer, through).sum(1)
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    squares: Tensor = norms.square().add_(products, alpha=scale)
    return squares.clamp_(min=0).sqrt_()


def _norm_and_products(
    prims: ModuleType, rows: Sequence[Tensor], weight: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Sequence[Tensor] | None]:
    """The norm and, where it is made in the same pass over W, the products of ``rows`` with W^T in
    fp32.
    """
    if prims is _native and rows and _native.takes_row_norms(weight, a):
        together = rows[0] if len(rows) == 1 else torch.cat(list(rows))
        if _native.takes_few_rows(together, weight, a):
            norm, product = _native.row_norms(weight, a, b, scale, together)
            assert product is not None
            return norm, [product] if len(rows) == 1 else product.split(rows[0].shape[0])
    return _weight_norm(prims, weight, a, b, scale), None


def _with_branch(x: Tensor, right: Tensor, a: Tensor, dtype: torch.dtype) -> bool:
    """Whether the product x right, in ``dtype``, takes a branch of LoRA with it on tiles."""
    fits = 0 < a.shape[0] <= _native.MAX_RANK and x.dtype == dtype
    return fits and _native.takes_product(x, right) and not _gemm.through_fp32(x.device, dtype)


def _plus_product(addend: Tensor, x: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """addend + x right, on tiles and rounded once."""
    return _native.lora_up(
        addend.new_empty(x.shape[0], 0), addend.new_empty(right.shape[1], 0), None,
        out_dtype=dtype, addend=addend, product=(x, right),
    )  # fmt: skip


def forward_with(prims: ModuleType, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward in terms of the primitives of a backend; y, t, the base product if it is needed,
    and the norm if it was not given."""
    x, weight, bias, a, b, magnitude, norm, seed, scaling, threshold = args[:10]
    dtype, base_dtype, need_base = args[10:]
    scale = _dropout.keep_scale(threshold)
    draw = {"seed": seed, "threshold": threshold, "branch": 0}
    kept = prims.drop(x, **draw) if threshold else x
    own_norm, products = weight.new_empty(0, dtype=accumulator(weight.dtype)), None
    if norm is None:
        rows = ((kept, x) if threshold else (x,)) if x.dtype == dtype else ()
        norm, products = _norm_and_products(prims, rows, weight, a, b, scaling)
        own_norm = norm
    g = magnitude.to(torch.float32) / norm
    up, factor = g[:, None] * b.to(torch.float32), (g - 1) * scale if threshold else g
    if prims is _native and products is None and _with_branch(x, weight.t(), a, dtype):
        base = x.new_empty((x.shape[0], weight.shape[0]) if need_base else (0,), dtype=base_dtype)
        y, t = prims.lora_layer(
            (kept, weight.t()), a, up, bias, scaling * scale, None,
            seed=None, threshold=0, branch=0, out_dtype=torch.float32 if threshold else dtype,
            kept=base if need_base else None, product_scale=factor,
        )  # fmt: skip
        y = _plus_product(y, x, weight.t(), dtype) if threshold else y
        return y, t, base, own_norm
    t = prims.lora_down(x, a, scaling * scale, None, **draw)
    exact = base_dtype == torch.float32 != dtype
    if products is not None:
        base = products[0]
    elif exact:
        base = _product_in_fp32(kept, weight, need_base)
    else:
        base = _product(prims, kept, weight, dtype)
    through_fp32 = prims is _native and _gemm.through_fp32(x.device, dtype)
    in_fp32 = threshold and (through_fp32 or products is not None)
    y = prims.lora_up(
        t, up, bias, out_dtype=torch.float32 if in_fp32 else dtype,
        addend=base, addend_scale=factor,
    )  # fmt: skip
    if threshold:
        if need_base and not exact and products is None:
            base = base.to(base_dtype, copy=True)  # out of the scratch buffer, before it is reused
        if products is not None:
            y = y.add_(products[1]).to(dtype)
        elif through_fp32:
            y = y.add_(_product(prims, x, weight, dtype)).to(dtype)
        else:
            y = y.addmm_(x.to(dtype), weight.to(dtype).t())
    if not need_base:
        base = x.new_empty(0, dtype=base_dtype)
    return y, t, base.to(base_dtype), own_norm


def backward_with(prims: ModuleType, *args: Any) -> list[Tensor]:
    """The backward in terms of the primitives of a backend."""
    dy, x, weight, a, b, magnitude, norm, t, base, seed, scaling, threshold, x_dtype, needs = args
    g, scale = magnitude.to(torch.float32) / norm, _dropout.keep_scale(threshold)
    draw = {"seed": seed, "threshold": threshold, "branch": 0}
    d, db = prims.lora_up_backward(
        dy, t, g[:, None] * b.to(torch.float32), scaling * scale, None,
        need_d=needs[0] or needs[3], need_db=needs[4] or needs[5],
    )  # fmt: skip
    grads: list[Tensor | None] = [None] * 6
    factor = (g - 1) * scale if threshold else g
    through_base = dy
    dots = None
    if prims is _native and needs[5]:
        scaled = _native.scratch("dora_backward", dy.shape[0], dy.shape[1], dy.dtype)
        through = needs[0] or needs[1]
        _, dots = prims.ia3_scale_backward(dy, base, factor, need_dx=through, out=scaled)
        through_base = scaled if through else dy
    elif needs[0] or needs[1]:
        through_base = torch.mul(dy, factor, out=torch.empty_like(dy))
    if needs[0]:
        grads[0] = _input_gradient(prims, dy, through_base, d, weight, a, draw, x_dtype)
    if needs[1]:
        kept = prims.drop(x, **draw) if threshold else x
        dw = _gemm.weight_gradient(through_base, kept, weight.dtype)
        grads[1] = dw.add_(_gemm.weight_gradient(dy, x, weight.dtype)) if threshold else dw
    if needs[2]:
        grads[2] = dy.sum(0, dtype=torch.float32)
    if needs[3]:
        off = {"dx_dtype": x_dtype, "need_dx": False, "need_da": True}
        grads[3] = prims.lora_down_backward(d, a, x, **draw, **off)[1]
    if needs[5]:
        dots = _column_dot(dy, base) if dots is None else dots
        dg = torch.mul(b, db).sum(1).add_(dots, alpha=scale)
        grads[5] = dg.div_(norm).to(magnitude.dtype)
    if needs[4]:
        grads[4] = db.mul_(g[:, None]).to(b.dtype)
    return [grad for grad, flag in zip(grads, needs, strict=True) if flag and grad is not None]


def _input_gradient(
    prims: ModuleType,
    dy: Tensor,
    through_base: Tensor,
    d: Tensor,
    weight: Tensor,
    a: Tensor,
    draw: dict[str, Any],
    dtype: torch.dtype,
) -> Tensor:
    tiles = prims is _native and dtype in (torch.bfloat16, torch.float32)
    if tiles and _with_branch(dy, weight, a, dy.dtype):
        part_dtype = torch.float32 if draw["threshold"] else dtype
        part: Tensor = prims.lora_up(
            d, a.t(), None, out_dtype=part_dtype, product=(through_base, weight)
        )
        if not draw["threshold"]:
            return part
        return _plus_product(prims.drop(part, **draw), dy, weight, dtype)
    product = _product_backward(prims, through_base, weight)
    if product.dtype != dtype:
        product = product.to(torch.float32)
    if not draw["threshold"]:
        dx: Tensor = prims.lora_up(d, a.t(), None, out_dtype=dtype, addend=product)
        return dx
    through_fp32 = prims is _native and _gemm.through_fp32(dy.device, dy.dtype)
    part_dtype = torch.float32 if through_fp32 else dtype
    dropped = prims.drop(
        prims.lora_up(d, a.t(), None, out_dtype=part_dtype, addend=product), **draw
    )
    if not through_fp32 and dropped.dtype == dy.dtype:
        dx = dropped.addmm_(dy, weight.to(dy.dtype))
        return dx
    dx = dropped.add_(_product_backward(prims, dy, weight)).to(dtype)
    return dx


def _column_dot(dy: Tensor, base: Tensor) -> Tensor:
    """sum_m dy[m] base[m] [N] in fp32."""
    total = torch.zeros(dy.shape[1], dtype=torch.float32, device=dy.device)
    step = max(1, _BLOCK_BYTES // (4 * max(dy.shape[1], 1)))
    step = step if dy.is_cpu else max(dy.shape[0], 1)
    for start in range(0, dy.shape[0], step):
        rows = slice(start, start + step)
        total += (dy[rows].to(torch.float32) * base[rows]).sum(0)
    return total


_support.register_lora_backends(
    FORWARD, BACKWARD, forward_with, backward_with, _dora_linear_reference
)

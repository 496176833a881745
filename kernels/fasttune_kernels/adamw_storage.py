"""How AdamW stores 16-bit parameters and small moments; fasttune.ops._adamw_storage states the
formats and is their reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .adamw_tables import CODE_SHIFT, QUANTISED, SIGNED_LOWEST, UNSIGNED_LOWEST
from .philox import random_lanes

_QUANTISED = tl.constexpr(QUANTISED)
_CODE_SHIFT = tl.constexpr(CODE_SHIFT)
_SIGNED_LOWEST = tl.constexpr(SIGNED_LOWEST)
_UNSIGNED_LOWEST = tl.constexpr(UNSIGNED_LOWEST)


@triton.jit
def load(pointer, i, numel, other, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer + i, mask=i < numel, other=other)
    return tl.load(pointer + i)


@triton.jit
def store(pointer, i, numel, value, MASKED: tl.constexpr):
    value = value.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + i, value, mask=i < numel)
    else:
        tl.store(pointer + i, value)


@triton.jit
def _is_finite(bits):
    return (bits & 0x7F800000) != 0x7F800000


@triton.jit
def _bf16_of(upper):
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def load_master(weight, low):
    """bf16 and int16 -> fp32."""
    high = weight.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    return (high + low.to(tl.int32).to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def store_master(master):
    """fp32 -> its nearest bf16 and the difference of the patterns."""
    bits = master.to(tl.uint32, bitcast=True)
    finite = _is_finite(bits)
    nearest = (bits + 0x8000) >> 16
    weight = tl.where(finite, _bf16_of(nearest), master.to(tl.bfloat16))
    low = tl.where(finite, bits - (nearest << 16), 0)
    return weight, low.to(tl.int16)


@triton.jit
def load_param(param, residue, i, numel, MASKED: tl.constexpr, ROUNDING: tl.constexpr):
    """A stretch of a parameter in fp32."""
    stored = load(param, i, numel, 0.0, MASKED)
    if ROUNDING == "master":
        return load_master(stored, load(residue, i, numel, 0, MASKED))
    value = stored.to(tl.float32)
    if ROUNDING == "kahan":
        value += load(residue, i, numel, 0.0, MASKED).to(tl.float32)
    return value


@triton.jit
def store_param(param, residue, i, numel, value, MASKED: tl.constexpr, ROUNDING: tl.constexpr):
    """Rounds to nearest what is not kept in a residue."""
    if ROUNDING == "master":
        weight, low = store_master(value)
        store(param, i, numel, weight, MASKED)
        store(residue, i, numel, low, MASKED)
    else:
        weight = value.to(param.dtype.element_ty)
        store(param, i, numel, weight, MASKED)
        if ROUNDING == "kahan":
            store(residue, i, numel, value - weight.to(tl.float32), MASKED)


@triton.jit
def store_stochastic(
    values, start, stream, step, purpose: tl.constexpr, key0, key1, BLOCK: tl.constexpr
):
    """fp32 -> bf16, either neighbour."""
    random = random_lanes(start, stream, step, purpose, key0, key1, BLOCK)
    bits = values.to(tl.uint32, bitcast=True)
    return tl.where(_is_finite(bits), _bf16_of((bits + random) >> 16), values.to(tl.bfloat16))


@triton.jit
def _of_elements(scales, BLOCK: tl.constexpr):
    spread = tl.broadcast_to(scales[:, None], (BLOCK // _QUANTISED, _QUANTISED))
    return tl.reshape(spread, (BLOCK,))


@triton.jit
def load_codes(codes, scales_ptr, start, numel, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """uint8 [BLOCK] -> fp32."""
    block = start // _QUANTISED + tl.arange(0, BLOCK // _QUANTISED)
    scales = tl.load(scales_ptr + block, mask=block < tl.cdiv(numel, _QUANTISED), other=0.0)
    codes = codes.to(tl.int32)
    size = codes & 0x7F if SIGNED else codes
    lowest: tl.constexpr = _SIGNED_LOWEST if SIGNED else _UNSIGNED_LOWEST
    bits = tl.where(size > 0, (size + lowest) << _CODE_SHIFT, 0)
    values = bits.to(tl.float32, bitcast=True) * _of_elements(scales, BLOCK)
    return tl.where(codes >= 0x80, -values, values) if SIGNED else values


@triton.jit
def store_codes(
    values, scales_ptr, start, numel, stream, step, purpose: tl.constexpr, key0, key1,
    SIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK] -> uint8 codes; stores the scales of their blocks."""
    inside = start + tl.arange(0, BLOCK) < numel
    size = tl.where(inside, tl.abs(values), 0.0)
    finite = _is_finite(size.to(tl.int32, bitcast=True))
    rows = tl.reshape(size, (BLOCK // _QUANTISED, _QUANTISED))
    broken = tl.max(tl.reshape(tl.where(finite, 0, 1), rows.shape), axis=1) > 0
    largest = tl.max(tl.where(broken[:, None], 0.0, rows), axis=1)
    scales = tl.where(largest < 1.1754943508222875e-38, 0.0, largest)
    scales = tl.where(broken, float("nan"), scales)
    block = start // _QUANTISED + tl.arange(0, BLOCK // _QUANTISED)
    tl.store(scales_ptr + block, scales, mask=block < tl.cdiv(numel, _QUANTISED))
    scale = _of_elements(scales, BLOCK)
    inverse = tl.div_rn(1.0, tl.where(scale == 0, 1.0, scale))
    ratio = size * inverse
    ratio = tl.where(ratio > 1.0, 1.0, ratio)
    random = random_lanes(start, stream, step, purpose, key0, key1, BLOCK).to(tl.int32)
    lowest: tl.constexpr = _SIGNED_LOWEST if SIGNED else _UNSIGNED_LOWEST
    rounded = (ratio.to(tl.int32, bitcast=True) + (random << 4)) >> _CODE_SHIFT
    code = tl.maximum(rounded - lowest, 0)
    if SIGNED:
        code = code | tl.where(values < 0, 0x80, 0)
    else:
        code = tl.where((size > 0) & (code == 0), 1, code)
    code = tl.where(scale == 0, 0, tl.where(scale == scale, code, 1))
    return code.to(tl.uint8)

"""How AdamW stores parameters of 16 bits and small moments, in torch: the reference of the formats.

A pattern is the bits of an fp32 value. Random bits are 16 for each element, drawn as dropout's
(docs/design.md) with the counter (element // 8, stream of the parameter, step, purpose).

- Stochastic rounding to bf16: the upper half of pattern + random bits.
- A master: the weight is the nearest bf16 of an fp32 value (ties away from zero), and its residue,
  int16, the difference of the patterns: nothing is lost.
- Kahan: the weight is the nearest value of its dtype, and its residue, of the same dtype, what the
  sum is short of.
- 8-bit moments: blocks of 256 elements share a scale, their largest magnitude; a code is a small
  float of the ratio to it, rounded stochastically, since a moving average changes by less than the
  distance of two codes: sign, 4 bits of exponent and 3 of mantissa for exp_avg, 5 and 3 for
  exp_avg_sq, whose positive values never become 0. (Block-wise scales: Dettmers et al., 2022.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune_kernels.adamw_tables import (
    CODE_SHIFT,
    QUANTISED,
    SIGNED_LOWEST,
    UNSIGNED_LOWEST,
)

_TINY = torch.finfo(torch.float32).tiny


def load_master(weight: Tensor, low: Tensor) -> Tensor:
    """The fp32 master of a bf16 weight and its int16 residue."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    return (high + low.to(torch.int32)).view(torch.float32)


def store_master(master: Tensor, weight: Tensor, low: Tensor) -> None:
    """Splits an fp32 master into the weight and its residue."""
    pattern = master.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    nearest = (pattern + 0x8000) >> 16
    finite = master.isfinite()
    weight.copy_(torch.where(finite, _bf16(nearest), master.to(torch.bfloat16)))
    low.copy_(torch.where(finite, pattern - (nearest << 16), 0).to(torch.int16))


def round_stochastically(values: Tensor, random: Tensor) -> Tensor:
    """fp32 to bf16; ``random`` int64 of the same shape, 16 bits."""
    pattern = values.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rounded = _bf16((pattern + random) >> 16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


def load_codes(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """fp32 values [n] of uint8 codes [n] and their scales [ceil(n / 256)]."""
    size = codes.to(torch.int32) & (0x7F if signed else 0xFF)
    lowest = SIGNED_LOWEST if signed else UNSIGNED_LOWEST
    pattern = torch.where(size > 0, (size + lowest) << CODE_SHIFT, 0).to(torch.int32)
    values = pattern.view(torch.float32) * _of_elements(scales, codes.numel())
    return torch.where(codes >= 0x80, -values, values) if signed else values


def store_codes(values: Tensor, random: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """uint8 codes [n] and scales [ceil(n / 256)] of fp32 values [n]."""
    count, blocks = values.numel(), -(-values.numel() // QUANTISED)
    padded = torch.nn.functional.pad(values.abs(), (0, blocks * QUANTISED - count))
    scales = padded.view(blocks, QUANTISED).amax(1)
    scales = torch.where(scales.isfinite(), scales, float("nan"))
    scales = torch.where(scales < _TINY, 0.0, scales)
    inverse = _of_elements(1.0 / scales, count)
    scaled = (values.abs() * inverse).clamp(max=1.0)
    pattern = scaled.nan_to_num().view(torch.int32).to(torch.int64)
    code = ((pattern + (random << 4)) >> CODE_SHIFT) - (
        SIGNED_LOWEST if signed else UNSIGNED_LOWEST
    )
    code = code.clamp(min=0)
    if signed:
        code = code | torch.where(values < 0, 0x80, 0)
    else:
        code = torch.where(values > 0, code.clamp(min=1), code)
    of_element = _of_elements(scales, count)
    code = torch.where(of_element == 0, 0, torch.where(of_element.isnan(), 1, code))
    return code.to(torch.uint8), scales


def _of_elements(scales: Tensor, count: int) -> Tensor:
    return scales.repeat_interleave(QUANTISED)[:count]


def _bf16(upper: Tensor) -> Tensor:
    """bf16 of the upper halves of patterns, in int64."""
    signed = torch.where(upper >= 0x8000, upper - 0x10000, upper)
    return signed.to(torch.int16).view(torch.bfloat16)

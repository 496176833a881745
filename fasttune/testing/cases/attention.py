"""Cases of attention: dtypes, grouped heads, masks, odd and single lengths, widths, strides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fasttune.ops import attention
from fasttune.testing.conformance import Call, Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Setting:
    """One configuration; ``keys`` is ``queries`` if 0."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    queries: int = 77
    keys: int = 0
    width: int = 32
    dtype: torch.dtype = FP32
    autocast: torch.dtype | None = None
    causal: bool = False
    mask: str = ""  # a key of _MASKS
    mask_dtype: torch.dtype = torch.bool
    scale: float | None = None
    layout: str = "transposed"  # of [B, S, H, D]; "contiguous"; or "packed": slices of one tensor
    frozen: str = ""


def _causal_with_padding(shape: tuple[int, ...], device: str) -> Tensor:
    """[B, 1, S, T]: causal, behind padding on the left, which sees nothing."""
    batch, _, queries, keys = shape
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
    padding = torch.arange(batch, device=device).flip(0).view(-1, 1) * (keys // 3)
    real = torch.arange(keys, device=device) >= padding
    return allowed & real[:, None, None, :]


def _random_holes(shape: tuple[int, ...], device: str) -> Tensor:
    """[B, Hq, S, T]: every other query head sees blocks of keys with gaps between them."""
    generator = torch.Generator(device).manual_seed(5)
    coarse = [shape[0], shape[1], -(-shape[2] // 9), -(-shape[3] // 21)]
    holes = torch.rand(coarse, generator=generator, device=device) < 0.5
    holes = holes.repeat_interleave(9, 2)[:, :, : shape[2]].repeat_interleave(21, 3)
    return holes[..., : shape[3]] | (torch.arange(shape[1], device=device) % 2 == 0)[:, None, None]


def _window(shape: tuple[int, ...], device: str) -> Tensor:
    """[S, T]: the last 20 keys."""
    distance = torch.arange(shape[2], device=device)[:, None] - torch.arange(
        shape[3], device=device
    )
    return (distance >= 0) & (distance < 20)


def _padded_keys(shape: tuple[int, ...], device: str) -> Tensor:
    """[B, 1, 1, T]: the last keys are padding."""
    lengths = shape[3] - torch.arange(shape[0], device=device) * (shape[3] // 4)
    return (torch.arange(shape[3], device=device) < lengths[:, None])[:, None, None, :]


def _per_query(shape: tuple[int, ...], device: str) -> Tensor:
    """[S, 1]: whole rows are masked."""
    return (torch.arange(shape[2], device=device) % 3 != 1)[:, None]


_MASKS = {
    "causal-with-padding": _causal_with_padding,
    "holes": _random_holes,
    "window": _window,
    "padded-keys": _padded_keys,
    "per-query": _per_query,
}


def _make_mask(setting: Setting, shape: tuple[int, ...], device: str) -> Tensor | None:
    if not setting.mask:
        return None
    allowed = _MASKS[setting.mask](shape, device)
    if setting.mask_dtype == torch.bool:
        return allowed
    generator = torch.Generator(device).manual_seed(6)
    bias = torch.randn(allowed.shape, generator=generator, device=device)
    return bias.to(setting.mask_dtype).masked_fill(~allowed, -torch.inf)


def _build(setting: Setting, device: str) -> Call:
    generator = torch.Generator(device).manual_seed(13)
    keys = setting.keys or setting.queries

    def random(positions: int, heads: int) -> Tensor:
        shape = (setting.batch, positions, heads, setting.width)
        return torch.randn(shape, generator=generator, device=device).to(setting.dtype)

    if setting.layout == "packed":
        packed = random(keys, setting.heads + 2 * setting.kv_heads)
        parts = packed.split([setting.heads, setting.kv_heads, setting.kv_heads], dim=2)
    else:
        parts = (
            random(setting.queries, setting.heads),
            random(keys, setting.kv_heads),
            random(keys, setting.kv_heads),
        )
    leaves = [part.detach().transpose(1, 2) for part in parts]
    if setting.layout == "contiguous":
        leaves = [leaf.contiguous() for leaf in leaves]
    for name, leaf in zip("qkv", leaves, strict=True):
        leaf.requires_grad_(name not in setting.frozen)
    shape = (setting.batch, setting.heads, setting.queries, keys)
    mask = _make_mask(setting, shape, device)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask=mask, causal=setting.causal, scale=setting.scale)

    def stock(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
        return scaled_dot_product_attention(
            *(q, k, v, bias),
            is_causal=setting.causal,
            scale=setting.scale,
            enable_gqa=True,
        )

    return Call(
        *(leaves, fused, stock, stock, setting.autocast, ("q", "k", "v")),
        gradient_floor=_cancellation(setting, *leaves[1:]) if keys == 1 else 0.0,
    )


def _cancellation(setting: Setting, k: Tensor, v: Tensor) -> float:
    """A rounding of what cancels in the gradient of q where each query sees one key: its weight is
    1, and dout v, of a dout of about 1 an element, is taken from itself.
    """
    scale = setting.width**-0.5 if setting.scale is None else setting.scale
    term = 3.0 * float(v.float().norm(dim=-1).max())
    return torch.finfo(setting.dtype).eps * term * scale * float(k.abs().max())


_BASE = Setting()
_CAUSAL = Setting(causal=True)
_BF16 = Setting(dtype=BF16, causal=True)

SETTINGS: dict[str, Setting] = {
    "fp32": _CAUSAL,
    "bf16": _BF16,
    "fp16": replace(_CAUSAL, dtype=FP16),
    "autocast": replace(_CAUSAL, autocast=BF16),
    # Which scores exist.
    "everything-visible": _BASE,
    "everything-visible-bf16": replace(_BASE, dtype=BF16),
    "cross": replace(_BASE, queries=37, keys=150),
    "causal-with-padding": replace(_BASE, mask="causal-with-padding", queries=150),
    "causal-with-padding-bf16": replace(_BASE, mask="causal-with-padding", queries=150, dtype=BF16),
    "holes": replace(_BASE, mask="holes", queries=150, keys=201),
    "holes-bf16": replace(_BASE, mask="holes", queries=150, keys=201, dtype=BF16),
    "window": replace(_BASE, mask="window", queries=200),
    "padded-keys": replace(_BASE, mask="padded-keys", keys=150),
    "masked-rows": replace(_BASE, mask="per-query"),
    "additive": replace(_BASE, mask="causal-with-padding", mask_dtype=FP32, queries=150),
    "additive-per-head": replace(_BASE, mask="holes", mask_dtype=FP32, queries=80, keys=100),
    "additive-bf16": replace(_BASE, mask="window", mask_dtype=BF16, dtype=BF16, queries=100),
    "additive-fp16": replace(_BASE, mask="padded-keys", mask_dtype=FP16, dtype=FP16),
    "additive-per-query": replace(_BASE, mask="per-query", mask_dtype=FP32),
    # Heads and widths.
    "smollm2": Setting(
        batch=2, heads=9, kv_heads=3, queries=100, width=64, dtype=BF16, causal=True
    ),
    "own-keys": replace(_CAUSAL, kv_heads=4),
    "one-kv-head": replace(_CAUSAL, heads=7, kv_heads=1),
    "width-80": replace(_CAUSAL, width=80),
    "width-128": replace(_BF16, width=128),
    "width-256": replace(_CAUSAL, width=256, queries=70),
    "odd-width": replace(_CAUSAL, width=13),
    "odd-width-bf16": replace(_BF16, width=41),
    "width-1": replace(_CAUSAL, width=1),
    "scale": replace(_CAUSAL, scale=0.7),
    "scale-bf16": replace(_BF16, scale=0.7),
    # Lengths.
    "one-query": replace(_BASE, queries=1, keys=130),
    "one-key": replace(_BASE, keys=1),
    "one-position": replace(_CAUSAL, queries=1),
    "full-blocks": replace(_CAUSAL, queries=256),
    "many-blocks": replace(_CAUSAL, batch=1, queries=333),
    "many-blocks-bf16": replace(_BF16, batch=1, queries=333),
    "empty-batch": replace(_CAUSAL, batch=0),
    # Strides and frozen inputs.
    "contiguous": replace(_CAUSAL, layout="contiguous"),
    "packed": replace(_CAUSAL, layout="packed"),
    "packed-bf16": replace(_BF16, layout="packed"),
    "query-frozen": replace(_CAUSAL, frozen="q"),
    "only-value": replace(_CAUSAL, frozen="qk"),
    "only-query": replace(_BF16, frozen="kv"),
}

CASES = [
    Case(f"attention-{name}", "attention", partial(_build, setting), ("reference", "cpu"))
    for name, setting in SETTINGS.items()
]
CASES.append(
    Case(
        "attention-fp64",
        "attention",
        lambda device: _build(
            Setting(dtype=FP64, queries=7, width=3, mask="causal-with-padding"), device
        ),
        backends=("reference",),
    )
)

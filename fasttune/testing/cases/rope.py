"""Cases of rope: layouts, dtypes, partial rotation, both kinds of pairs, one frozen side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fasttune.ops import rope
from fasttune.testing.conformance import Call, Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Setting:
    """One configuration; ``layout`` is the order of the leaves' memory."""

    batch: int = 2
    heads: int = 6
    kv_heads: int | None = 2  # None: no keys
    positions: int = 19
    features: int = 64
    rotary: int | None = None  # None: all features
    x: torch.dtype = FP32
    k: torch.dtype | None = None
    angles: torch.dtype = FP32
    shared: bool = False  # one row of cos and sin for the whole batch
    interleaved: bool = False
    layout: str = "bshd"  # "bhsd"; "packed": q, k in one [B, S, (Hq + Hk) D]; "bhds": D strided
    frozen: str = ""


def _views(setting: Setting, leaves: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    """q and k [B, H, S, D] as a model would hand them over."""
    if setting.layout == "packed":
        heads = leaves[0].unflatten(-1, (-1, setting.features)).transpose(1, 2)
        return heads[:, : setting.heads], heads[:, setting.heads :]
    order = {"bshd": (0, 2, 1, 3), "bhsd": (0, 1, 2, 3), "bhds": (0, 1, 3, 2)}[setting.layout]
    views = [leaf.permute(order) for leaf in leaves]
    return views[0], views[1] if len(views) > 1 else None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """apply_rotary_pos_emb of transformers for one tensor, in the dtype that torch promotes to."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if interleaved:
        swapped = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        half = cos.shape[-1] // 2
        swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    y = turned * cos.unsqueeze(1) + swapped * sin.unsqueeze(1)
    return torch.cat((y.to(x.dtype), rest), dim=-1)


def _build(setting: Setting, device: str) -> Call:
    generator = torch.Generator(device).manual_seed(7)

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    sizes = {
        "b": setting.batch,
        "s": setting.positions,
        "d": setting.features,
    }
    if setting.layout == "packed":
        assert setting.kv_heads is not None
        width = (setting.heads + setting.kv_heads) * setting.features
        leaves = [random((setting.batch, setting.positions, width), setting.x)]
        names = ["qk"]
    else:
        counts = [setting.heads] + ([] if setting.kv_heads is None else [setting.kv_heads])
        dtypes = (setting.x, setting.k or setting.x)
        leaves = [
            random(tuple(sizes.get(axis, count) for axis in setting.layout), dtype)
            for count, dtype in zip(counts, dtypes, strict=False)
        ]
        names = ["q", "k"][: len(leaves)]
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name not in setting.frozen.split())
    # Random, so that the two of a pair differ and the backward must be the exact transpose.
    rotary = setting.features if setting.rotary is None else setting.rotary
    shape = (1 if setting.shared else setting.batch, setting.positions, rotary)
    cos, sin = random(shape, setting.angles), random(shape, setting.angles)

    def together(q: Tensor, k: Tensor | None) -> Tensor:
        return q.flatten() if k is None else torch.cat((q.flatten(), k.flatten()))

    def fused(*tensors: Tensor) -> Tensor:
        q, k = _views(setting, tensors)
        return together(*rope(q, k, cos, sin, interleaved=setting.interleaved))

    def stock(*tensors: Tensor) -> Tensor:
        q, k = _views(setting, tensors)
        wide = FP64 if q.dtype == FP64 else setting.angles
        angles = cos.to(wide), sin.to(wide)
        rotated = [None if x is None else _rotated(x, *angles, setting.interleaved) for x in (q, k)]
        assert rotated[0] is not None
        return together(rotated[0], rotated[1])

    return Call(leaves, fused, stock, stock, None, names)


_BASE = Setting()
_BF16 = Setting(x=BF16, angles=BF16)

SETTINGS: dict[str, Setting] = {
    "fp32": _BASE,
    "bf16": _BF16,
    "fp16": replace(_BASE, x=FP16, angles=FP16),
    "bf16-angles-fp32": replace(_BF16, angles=FP32),
    "fp32-angles-bf16": replace(_BASE, angles=BF16),
    "fp16-angles-bf16": replace(_BASE, x=FP16, angles=BF16),
    "queries-bf16-keys-fp32": replace(_BF16, k=FP32),
    "interleaved-fp32": replace(_BASE, interleaved=True),
    "interleaved-bf16": replace(_BF16, interleaved=True),
    "interleaved-fp16": replace(_BASE, x=FP16, interleaved=True),
    # Partial rotation: R of 16 lanes and more, below 16 lanes, and no multiple of a vector.
    "partial": replace(_BF16, rotary=32),
    "partial-narrow": replace(_BF16, features=40, rotary=10),
    "partial-interleaved-fp32": replace(_BASE, rotary=48, interleaved=True),
    "partial-interleaved-narrow": replace(_BF16, features=37, rotary=6, interleaved=True),
    "width-80": replace(_BF16, features=80),
    "width-96-interleaved": replace(_BF16, features=96, interleaved=True),
    "odd-width": replace(_BF16, features=77, rotary=74),
    "odd-width-interleaved": replace(_BASE, features=77, rotary=74, interleaved=True),
    "two-features": replace(_BASE, features=2),
    # Layouts.
    "contiguous": replace(_BF16, layout="bhsd"),
    "contiguous-interleaved": replace(_BF16, layout="bhsd", interleaved=True),
    "packed": replace(_BF16, layout="packed"),
    "packed-partial-fp32": replace(_BASE, layout="packed", rotary=48),
    "features-strided": replace(_BF16, layout="bhds"),
    "shared-angles": replace(_BF16, shared=True),
    # Sizes and frozen parts.
    "queries-only": replace(_BF16, kv_heads=None),
    "queries-frozen": replace(_BF16, frozen="q"),
    "keys-frozen-fp32": replace(_BASE, frozen="k"),
    "one-position": replace(_BF16, positions=1),
    "one-head": replace(_BF16, heads=1, kv_heads=1),
    "many-heads": replace(_BF16, heads=9, kv_heads=5, positions=5),
    "no-positions": replace(_BF16, positions=0),
    "no-batch": replace(_BF16, batch=0, interleaved=True),
    "many-rows": replace(_BF16, heads=4, positions=150, features=128),
}

CASES = [
    Case(f"rope-{name}", "rope", partial(_build, setting)) for name, setting in SETTINGS.items()
]
_FP64 = replace(_BASE, x=FP64, positions=3, features=10)
CASES += [
    Case(f"rope-{name}", "rope", partial(_build, setting), backends=("reference",))
    for name, setting in (
        ("fp64", _FP64),
        ("interleaved-fp64", replace(_FP64, interleaved=True, rotary=6)),
    )
]

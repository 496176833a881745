"""Cases of rms_norm and add_rms_norm: cast orders, dtypes, shapes, partial training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttune.ops import add_rms_norm, rms_norm
from fasttune.testing.conformance import WITH_CUDA, WITHOUT_CUDA, Call, Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
EPS = 1e-5


@dataclass(frozen=True)
class Setting:
    """One configuration; ``lead`` is x's shape before the features."""

    lead: tuple[int, ...] = (2, 19)
    features: int = 48
    x: torch.dtype = FP32
    weight: torch.dtype | None = FP32  # None: no weight
    offset: float = 0.0
    round_first: bool = False
    residual: bool = False  # add_rms_norm: both outputs, side by side
    strided: bool = False
    frozen: str = ""  # names of leaves that need no gradient
    scale: float = 1.0
    autocast: torch.dtype | None = None


def _build(setting: Setting, device: str) -> Call:
    generator = torch.Generator(device).manual_seed(3)

    def random(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    shape = (*setting.lead, setting.features)
    if setting.strided:
        x = random((*shape[:-1], 2 * setting.features), setting.x, 1.0)[..., : setting.features]
    else:
        x = random(shape, setting.x, setting.scale)
    leaves, names = [x], ["x"]
    if setting.residual:
        leaves.append(random(shape, setting.x, 1.0))
        names.append("residual")
    if setting.weight is not None:
        leaves.append(random((setting.features,), setting.weight, 0.3) + 1 - setting.offset)
        names.append("weight")
    leaves = [leaf.detach() for leaf in leaves]
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name not in setting.frozen.split())
    options: dict[str, Any] = {
        "eps": EPS,
        "weight_offset": setting.offset,
        "round_first": setting.round_first,
    }

    def split(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rest = list(tensors[1:])
        residual = rest.pop(0) if setting.residual else None
        return tensors[0], residual, rest[0] if rest else None

    def fused(*tensors: Tensor) -> Tensor:
        x, residual, weight = split(tensors)
        if residual is None:
            return rms_norm(x, weight, **options)
        return torch.cat(add_rms_norm(x, residual, weight, **options), dim=-1)

    def stock(*tensors: Tensor) -> Tensor:
        """LlamaRMSNorm, GemmaRMSNorm or Olmo2RMSNorm of transformers, after an addition."""
        x, residual, weight = split(tensors)
        s = x if residual is None else x + residual
        wide = s.to(torch.promote_types(s.dtype, FP32))
        n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        if weight is None:
            y = n.to(s.dtype)
        elif setting.round_first:
            y = (setting.offset + weight if setting.offset else weight) * n.to(s.dtype)
        else:
            y = (n * (setting.offset + weight.to(wide.dtype))).to(s.dtype)
        return y if residual is None else torch.cat([y, s], dim=-1)

    floor = 0.0
    if setting.features == 1:  # dx = rstd (g - g n^2), and n is 1 but for eps: a unit of the terms
        rstd = (x.detach().double().square() + EPS).rsqrt().max()
        floor = torch.finfo(FP32).eps * float(rstd * leaves[-1].detach().abs().max())
    return Call(leaves, fused, stock, stock, setting.autocast, names, gradient_floor=floor)


_BASE = Setting()
_HALF = Setting(x=BF16, weight=BF16)
_LLAMA = replace(_HALF, round_first=True)

SETTINGS: dict[str, Setting] = {
    "fp32": _BASE,
    "bf16": _HALF,
    "fp16": replace(_BASE, x=FP16, weight=FP16),
    "round-first-fp32": replace(_BASE, round_first=True),
    "round-first": _LLAMA,
    "round-first-fp16": replace(_LLAMA, x=FP16, weight=FP16),
    "round-first-fp32-weight": replace(_LLAMA, weight=FP32),
    "fp32-weight": replace(_HALF, weight=FP32),
    "bf16-weight": replace(_BASE, weight=BF16),
    "offset": replace(_HALF, offset=1.0),
    "offset-fp32": replace(_BASE, offset=1.0),
    "without-weight": replace(_HALF, weight=None),
    "without-weight-fp32": replace(_BASE, weight=None),
    "autocast": replace(_BASE, autocast=BF16),
    "small-values": replace(_BASE, scale=1e-3),
    "frozen-weight": replace(_LLAMA, frozen="weight"),
    "frozen-x": replace(_LLAMA, frozen="x"),
    "one-dimensional": replace(_LLAMA, lead=()),
    "one-row": replace(_BASE, lead=(1,)),
    "empty": replace(_LLAMA, lead=(0, 7)),
    "one-feature": replace(_BASE, features=1),
    "odd-sizes": replace(_LLAMA, lead=(37,), features=77),
    "odd-sizes-fp32": replace(_BASE, lead=(37,), features=77),
    "strided": replace(_LLAMA, strided=True),
    "many-rows": replace(_LLAMA, lead=(1100,), features=24),
    "wide": replace(_LLAMA, lead=(5,), features=2100),
    "add": replace(_LLAMA, residual=True),
    "add-fp32": replace(_BASE, residual=True, lead=(33,), features=51),
    "add-frozen-weight": replace(_LLAMA, residual=True, frozen="weight"),
    "add-frozen-residual": replace(_HALF, residual=True, frozen="residual", offset=1.0),
}

CASES = [
    Case(
        f"rms_norm-{name}",
        "rms_norm",
        partial(_build, setting),
        WITH_CUDA if setting.weight in (None, setting.x, FP32) else WITHOUT_CUDA,
    )
    for name, setting in SETTINGS.items()
]
_EXACT = replace(_BASE, x=FP64, weight=FP64, lead=(3,), features=9)
CASES += [
    Case(f"rms_norm-{name}", "rms_norm", partial(_build, setting), backends=("reference",))
    for name, setting in (("fp64", _EXACT), ("add-fp64", replace(_EXACT, residual=True)))
]

"""Cases of ia3_scale: dtypes, frozen parts, shapes, layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fasttune.ops.ia3_scale import ia3_scale
from fasttune.testing.conformance import Call, Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Setting:
    """One configuration; ``lead`` is x's shape before the features."""

    lead: tuple[int, ...] = (2, 19)
    features: int = 72
    x: torch.dtype = FP32
    scale: torch.dtype = FP32
    layout: str = ""  # or "strided rows", "transposed"
    frozen: str = ""  # names of leaves that need no gradient
    autocast: torch.dtype | None = None


def _build(setting: Setting, device: str) -> Call:
    generator = torch.Generator(device).manual_seed(8)

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    features, names = setting.features, ["x", "scale"]
    if setting.layout == "strided rows":
        x = random((*setting.lead, 2 * features), setting.x)[..., :features]
    elif setting.layout == "transposed":
        x = random((features, *setting.lead), setting.x).movedim(0, -1)
    else:
        x = random((*setting.lead, features), setting.x)
    leaves = [x, random((features,), setting.scale)]
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name not in setting.frozen.split())

    def stock(x: Tensor, scale: Tensor) -> Tensor:
        return (x * scale).to(x.dtype)

    return Call(leaves, ia3_scale, stock, stock, setting.autocast, names)


_BASE = Setting()
_HALF = Setting(x=BF16, scale=BF16)

SETTINGS: dict[str, Setting] = {
    "fp32": _BASE,
    "bf16": _HALF,
    "fp16": replace(_BASE, x=FP16, scale=FP16),
    "bf16-x-fp32-scale": replace(_BASE, x=BF16),
    "fp16-x-fp32-scale": replace(_BASE, x=FP16),
    "fp32-x-bf16-scale": replace(_BASE, scale=BF16),
    "fp16-x-bf16-scale": replace(_HALF, x=FP16),
    "autocast": replace(_BASE, autocast=BF16),
    "autocast-bf16-x": replace(_BASE, x=BF16, autocast=BF16),
    # Partial training.
    "frozen-scale": replace(_BASE, x=BF16, frozen="scale"),
    "frozen-x": replace(_BASE, x=BF16, frozen="x"),
    "frozen": replace(_HALF, frozen="x scale"),
    # Shapes.
    "one-dimensional": replace(_HALF, lead=()),
    "four-dimensional": replace(_BASE, lead=(2, 3, 5)),
    "one-row": replace(_HALF, lead=(1,)),
    "one-column": replace(_HALF, lead=(23,), features=1),
    "empty": replace(_HALF, lead=(0, 7)),
    "empty-frozen-x": replace(_HALF, lead=(0, 7), frozen="x"),
    "no-features": replace(_BASE, features=0),
    "odd-sizes": replace(_HALF, lead=(37,), features=53),
    "odd-sizes-mixed": replace(_BASE, lead=(3,), features=1051, x=BF16),
    "strided-rows": replace(_BASE, x=BF16, layout="strided rows"),
    "strided-rows-odd": replace(_BASE, layout="strided rows", features=21),
    "transposed": replace(_HALF, layout="transposed"),
    "many-rows": replace(_BASE, lead=(1100,), features=24, x=BF16),
    "several-pieces": replace(_HALF, lead=(70,), features=2500),
}

CASES = [
    Case(f"ia3_scale-{name}", "ia3_scale", partial(_build, setting))
    for name, setting in SETTINGS.items()
]
_EXACT = replace(_BASE, x=FP64, scale=FP64, lead=(7,), features=9)
CASES += [
    Case(f"ia3_scale-{name}", "ia3_scale", partial(_build, setting), backends=("reference",))
    for name, setting in (("fp64", _EXACT), ("frozen-scale-fp64", replace(_EXACT, frozen="scale")))
]

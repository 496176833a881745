"""Cases of bias_activation: activations, dtypes, with and without bias, partial training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fasttune.ops import bias_activation
from fasttune.ops._activations import ACTIVATIONS
from fasttune.testing.conformance import WITH_CUDA, Call, Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Setting:
    """One configuration; ``lead`` is x's shape before the features."""

    lead: tuple[int, ...] = (2, 19)
    features: int = 72
    activation: str = "gelu_tanh"
    x: torch.dtype = FP32
    bias: torch.dtype | None = FP32
    layout: str = ""  # or "strided rows", "transposed"
    frozen: str = ""  # names of leaves that need no gradient
    scale: float = 2.0  # standard deviation of x
    autocast: torch.dtype | None = None


def _build(setting: Setting, device: str) -> Call:
    generator = torch.Generator(device).manual_seed(6)

    def random(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    features, names = setting.features, ["x"]
    if setting.layout == "strided rows":
        x = random((*setting.lead, 2 * features), setting.x, setting.scale)[..., :features]
    elif setting.layout == "transposed":
        x = random((features, *setting.lead), setting.x, setting.scale).movedim(0, -1)
    else:
        x = random((*setting.lead, features), setting.x, setting.scale)
    leaves = [x]
    if setting.bias is not None:
        leaves.append(random((features,), setting.bias, 1.0))
        names.append("bias")
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name not in setting.frozen.split())

    def fused(*tensors: Tensor) -> Tensor:
        return bias_activation(*tensors, activation=setting.activation)

    def stock(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ACTIVATIONS[setting.activation].value(x if bias is None else x + bias)

    return Call(leaves, fused, stock, stock, setting.autocast, names)


_BASE = Setting()
_HALF = Setting(x=BF16, bias=BF16)

SETTINGS: dict[str, Setting] = {
    **{f"{name}-fp32": replace(_BASE, activation=name) for name in ACTIVATIONS},
    **{f"{name}-bf16": replace(_HALF, activation=name) for name in ACTIVATIONS},
    **{f"{name}-far": replace(_BASE, activation=name, scale=20.0) for name in ACTIVATIONS},
    "fp16": replace(_BASE, x=FP16, bias=FP16),
    "bf16-x-fp32-bias": replace(_BASE, x=BF16),
    "fp32-x-bf16-bias": replace(_BASE, bias=BF16),
    "fp16-x-bf16-bias": replace(_HALF, x=FP16),
    "autocast": replace(_BASE, x=BF16, autocast=BF16),
    "no-bias": replace(_HALF, bias=None),
    "no-bias-fp32": replace(_BASE, bias=None),
    # Partial training.
    "frozen-bias": replace(_HALF, frozen="bias"),
    "frozen-bias-mixed": replace(_BASE, x=BF16, frozen="bias"),
    "frozen-x": replace(_HALF, frozen="x"),
    "frozen-x-mixed": replace(_BASE, x=BF16, frozen="x"),
    "frozen": replace(_HALF, frozen="x bias"),
    # Shapes.
    "one-dimensional": replace(_HALF, lead=()),
    "four-dimensional": replace(_BASE, lead=(2, 3, 5)),
    "one-row": replace(_HALF, lead=(1,)),
    "one-column": replace(_HALF, lead=(23,), features=1),
    "empty": replace(_HALF, lead=(0, 7)),
    "no-features": replace(_BASE, features=0),
    "odd-sizes": replace(_HALF, lead=(37,), features=53),
    "odd-sizes-mixed": replace(_BASE, lead=(3,), features=1051, x=BF16),
    "strided-rows": replace(_HALF, layout="strided rows"),
    "strided-rows-no-bias": replace(_BASE, layout="strided rows", features=21, bias=None),
    "transposed": replace(_HALF, layout="transposed"),
    "many-rows": replace(_HALF, lead=(700,), features=24),
    "several-pieces": replace(_HALF, lead=(3,), features=9001),
}

CASES = [
    Case(f"bias_activation-{name}", "bias_activation", partial(_build, setting), WITH_CUDA)
    for name, setting in SETTINGS.items()
]
CASES += [
    Case(
        f"bias_activation-{name}-fp64",
        "bias_activation",
        partial(_build, replace(_BASE, lead=(7,), activation=name, x=FP64, bias=FP64)),
        backends=("reference",),
    )
    for name in ACTIVATIONS
]

"""Cases of scaled_glu: activations, dtypes, packed and strided operands, partial training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fasttune.ops._activations import ACTIVATIONS
from fasttune.ops.scaled_glu import scaled_glu
from fasttune.testing.conformance import Call, Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Setting:
    """One configuration; ``lead`` is the operands' shape before the features."""

    lead: tuple[int, ...] = (2, 19)
    features: int = 72
    activation: str = "silu"
    gate: torch.dtype = FP32
    up: torch.dtype = FP32
    scale: torch.dtype = FP32
    packed: str = ""  # or "gate first", "up first"
    layout: str = ""  # or "strided rows", "transposed"
    frozen: str = ""  # names of leaves that need no gradient
    spread: float = 2.0  # standard deviation of the gate
    autocast: torch.dtype | None = None


def _build(setting: Setting, device: str) -> Call:
    generator = torch.Generator(device).manual_seed(6)

    def random(features: int, dtype: torch.dtype, spread: float) -> Tensor:
        shape = (*setting.lead, features)
        if setting.layout == "strided rows":
            shape = (*setting.lead, 2 * features)
        elif setting.layout == "transposed":
            shape = (features, *setting.lead)
        x = (torch.randn(shape, generator=generator, device=device) * spread).to(dtype)
        if setting.layout == "strided rows":
            return x[..., :features]
        return x.movedim(0, -1) if setting.layout == "transposed" else x

    if setting.packed:
        leaves, names = [random(2 * setting.features, setting.gate, setting.spread)], ["packed"]
    else:
        leaves = [
            random(setting.features, setting.gate, setting.spread),
            random(setting.features, setting.up, 1.0),
        ]
        names = ["gate", "up"]
    scale = torch.randn(setting.features, generator=generator, device=device).to(setting.scale)
    leaves, names = [*leaves, scale], [*names, "scale"]
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name not in setting.frozen.split())
    gate_first = setting.packed != "up first"

    def fused(*tensors: Tensor) -> Tensor:
        gate, up, scale = tensors if len(tensors) == 3 else (tensors[0], None, tensors[1])
        return scaled_glu(gate, up, scale, activation=setting.activation, gate_first=gate_first)

    def stock(*tensors: Tensor) -> Tensor:
        """The line of transformers' MLPs between the products, then that of PEFT's (IA)^3."""
        *parts, scale = tensors
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
        if not gate_first:
            gate, up = up, gate
        h = ACTIVATIONS[setting.activation].value(gate) * up
        return (h * scale).to(h.dtype)

    return Call(leaves, fused, stock, stock, setting.autocast, names)


_BASE = Setting()
_HALF = Setting(gate=BF16, up=BF16)

SETTINGS: dict[str, Setting] = {
    **{f"{name}-fp32": replace(_BASE, activation=name) for name in ACTIVATIONS},
    "silu-bf16": _HALF,
    "gelu-bf16": replace(_HALF, activation="gelu"),
    "gelu_tanh-bf16-scale": replace(_HALF, activation="gelu_tanh", scale=BF16),
    "silu-far": replace(_BASE, spread=20.0),
    "silu-fp16": replace(_BASE, gate=FP16, up=FP16, scale=FP16),
    "bf16-gate-fp32-up": replace(_BASE, gate=BF16),
    "fp16-gate-bf16-up": replace(_BASE, gate=FP16, up=BF16),
    "autocast": replace(_HALF, autocast=BF16),
    # Packed.
    "packed-fp32": replace(_BASE, packed="gate first"),
    "packed-up-first": replace(_HALF, packed="up first", activation="gelu_tanh"),
    "packed-odd": replace(_HALF, packed="gate first", features=37),
    "packed-strided": replace(_HALF, packed="up first", layout="strided rows"),
    "packed-frozen": replace(_HALF, packed="gate first", frozen="packed"),
    # Partial training.
    "frozen-gate": replace(_HALF, frozen="gate"),
    "frozen-up": replace(_HALF, frozen="up"),
    "frozen-up-mixed": replace(_BASE, frozen="up", gate=BF16),
    "frozen-scale": replace(_HALF, frozen="scale"),
    "only-scale": replace(_HALF, frozen="gate up"),
    "frozen": replace(_HALF, frozen="gate up scale"),
    # Shapes.
    "one-dimensional": replace(_HALF, lead=()),
    "four-dimensional": replace(_BASE, lead=(2, 3, 5)),
    "one-row": replace(_HALF, lead=(1,)),
    "one-column": replace(_HALF, lead=(23,), features=1),
    "empty": replace(_HALF, lead=(0, 7)),
    "no-features": replace(_BASE, features=0),
    "odd-sizes": replace(_HALF, lead=(37,), features=53),
    "odd-sizes-mixed": replace(_BASE, lead=(3,), features=1051, up=BF16),
    "strided-rows": replace(_HALF, layout="strided rows"),
    "strided-rows-odd": replace(_BASE, layout="strided rows", features=21),
    "transposed": replace(_HALF, layout="transposed"),
    "many-rows": replace(_HALF, lead=(1100,), features=24),
    "several-pieces": replace(_HALF, lead=(70,), features=2500),
}

CASES = [
    Case(f"scaled_glu-{name}", "scaled_glu", partial(_build, setting))
    for name, setting in SETTINGS.items()
]
_EXACT = replace(_BASE, gate=FP64, up=FP64, scale=FP64, lead=(7,), features=9)
CASES += [
    Case(f"scaled_glu-{name}", "scaled_glu", partial(_build, setting), backends=("reference",))
    for name, setting in (
        ("fp64", _EXACT),
        ("packed-fp64", replace(_EXACT, packed="gate first", activation="gelu")),
    )
]

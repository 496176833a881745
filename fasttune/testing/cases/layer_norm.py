"""Cases of layer_norm and add_layer_norm: biases, dtypes, shapes, partial training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fasttune.ops import add_layer_norm, layer_norm
from fasttune.testing.conformance import Call, Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
EPS = 1e-5


@dataclass(frozen=True)
class Setting:
    """One configuration; ``lead`` is x's shape before the features."""

    lead: tuple[int, ...] = (2, 19)
    features: int = 48
    x: torch.dtype = FP32
    weight: torch.dtype | None = FP32  # None: neither weight nor bias
    bias: bool = True
    residual: bool = False  # add_layer_norm: both outputs, side by side
    strided: bool = False
    frozen: str = ""  # names of leaves that need no gradient
    mean: float = 0.0  # of x


def _build(setting: Setting, device: str) -> Call:
    generator = torch.Generator(device).manual_seed(4)

    def random(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) + mean).to(dtype)

    shape = (*setting.lead, setting.features)
    if setting.strided:
        x = random((*shape[:-1], 2 * setting.features), setting.x)[..., : setting.features]
    else:
        x = random(shape, setting.x, setting.mean)
    leaves, names = [x], ["x"]
    if setting.residual:
        leaves.append(random(shape, setting.x))
        names.append("residual")
    if setting.weight is not None:
        leaves.append(random((setting.features,), setting.weight, 1.0))
        names.append("weight")
        if setting.bias:
            leaves.append(random((setting.features,), setting.weight))
            names.append("bias")
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name not in setting.frozen.split())

    def split(
        tensors: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, Tensor | None]]:
        rest: list[Tensor | None] = list(tensors[1:])
        residual = rest.pop(0) if setting.residual else None
        weight, bias, *_ = [*rest, None, None]
        return tensors[0], residual, (weight, bias)

    def fused(*tensors: Tensor) -> Tensor:
        x, residual, vectors = split(tensors)
        if residual is None:
            return layer_norm(x, vectors[0], vectors[1], eps=EPS)
        return torch.cat(add_layer_norm(x, residual, vectors[0], vectors[1], eps=EPS), dim=-1)

    def stock(*tensors: Tensor) -> Tensor:
        x, residual, vectors = split(tensors)
        s = x if residual is None else x + residual
        wide = [None if v is None else v.to(torch.promote_types(v.dtype, FP32)) for v in vectors]
        if all(v is None or v.dtype == s.dtype for v in vectors):
            y = torch.nn.functional.layer_norm(s, s.shape[-1:], *vectors, EPS)
        else:
            up = s.to(torch.promote_types(s.dtype, FP32))
            y = torch.nn.functional.layer_norm(up, s.shape[-1:], wide[0], wide[1], EPS).to(s.dtype)
        return y if residual is None else torch.cat([y, s], dim=-1)

    return Call(leaves, fused, stock, stock, None, names)


_BASE = Setting()
_HALF = Setting(x=BF16, weight=BF16)

SETTINGS: dict[str, Setting] = {
    "fp32": _BASE,
    "bf16": _HALF,
    "fp16": replace(_BASE, x=FP16, weight=FP16),
    "fp32-weight": replace(_HALF, weight=FP32),
    "bf16-weight": replace(_BASE, weight=BF16),
    "without-bias": replace(_HALF, bias=False),
    "without-weight": replace(_BASE, weight=None),
    "without-weight-bf16": replace(_HALF, weight=None),
    "far-from-zero": replace(_BASE, mean=100.0),
    "frozen-weight": replace(_HALF, frozen="weight"),
    "frozen-bias": replace(_HALF, frozen="bias"),
    "frozen-both": replace(_BASE, frozen="weight bias"),
    "frozen-x": replace(_HALF, frozen="x"),
    "one-dimensional": replace(_HALF, lead=()),
    "one-row": replace(_BASE, lead=(1,)),
    "empty": replace(_HALF, lead=(0, 7)),
    "odd-sizes": replace(_HALF, lead=(37,), features=77),
    "odd-sizes-fp32": replace(_BASE, lead=(37,), features=77),
    "strided": replace(_HALF, strided=True),
    "many-rows": replace(_HALF, lead=(1100,), features=24),
    "wide": replace(_HALF, lead=(5,), features=2100),
    "add": replace(_HALF, residual=True),
    "add-fp32": replace(_BASE, residual=True, lead=(33,), features=51),
    "add-frozen": replace(_HALF, residual=True, frozen="weight bias"),
}

CASES = [
    Case(f"layer_norm-{name}", "layer_norm", partial(_build, setting))
    for name, setting in SETTINGS.items()
]
_EXACT = replace(_BASE, x=FP64, weight=FP64, lead=(3,), features=9)
CASES += [
    Case(f"layer_norm-{name}", "layer_norm", partial(_build, setting), backends=("reference",))
    for name, setting in (("fp64", _EXACT), ("add-fp64", replace(_EXACT, residual=True)))
]

"""Cases of dora_linear: dtypes, dropout, autocast, frozen parts, shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from fasttune.ops import _dropout
from fasttune.ops.dora_linear import dora_linear, dora_weight_norm
from fasttune.testing.conformance import Call, Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SCALING = 1.5


@dataclass(frozen=True)
class Setting:
    """One configuration; ``lead`` is x's shape before the features."""

    lead: tuple[int, ...] = (2, 19)
    features: int = 48
    outputs: int = 40
    rank: int = 8
    x: torch.dtype = FP32
    adapter: torch.dtype = FP32
    autocast: torch.dtype | None = None
    dropout: float = 0.0
    bias: bool = False
    frozen: str = ""
    fixed_norm: bool = False  # finite differences would see that it is no constant


def _build(setting: Setting, device: str) -> Call:
    generator = torch.Generator(device).manual_seed(11)

    def random(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    features, outputs, rank = setting.features, setting.outputs, setting.rank
    leaves = [
        random((*setting.lead, features), setting.x, 1.0),
        random((outputs, features), setting.x, features**-0.5),
        random((rank, features), setting.adapter, features**-0.5),
        random((outputs, rank), setting.adapter, rank**-0.5),
        random((outputs,), setting.adapter, 0.3) + 1,
    ]
    names = ["x", "weight", "a", "b", "magnitude"]
    if setting.bias:
        leaves.append(random((outputs,), setting.x, 1.0))
        names.append("bias")
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name not in setting.frozen.split())
    seed = torch.tensor(-81985529216486896, device=device)

    norm = (
        dora_weight_norm(leaves[1], leaves[2], leaves[3], SCALING) if setting.fixed_norm else None
    )

    def fused(*tensors: Tensor) -> Tensor:
        bias = tensors[5] if setting.bias else None
        p = setting.dropout
        x, weight, a, b, m = tensors[:5]
        return dora_linear(
            x, weight, a, b, m,
            bias=bias, scaling=SCALING, dropout_p=p, seed=seed, weight_norm=norm,
        )  # fmt: skip

    def stock(*tensors: Tensor) -> Tensor:
        """peft.tuners.lora.dora.DoraLinearLayer.forward, with the mask of the seed."""
        x, weight, a, b, magnitude, *rest = tensors
        result = linear(x, weight, rest[0] if rest else None)
        dtype, base, dropped = result.dtype, linear(x, weight), x.to(a.dtype)
        whole = weight.to(dropped.dtype) + SCALING * (b @ a).to(dropped.dtype)
        rows = torch.linalg.vector_norm(whole, dim=1).detach()
        scale = magnitude / (rows if norm is None else norm)
        if setting.dropout:
            threshold = _dropout.threshold(setting.dropout)
            rows = x.numel() // x.shape[-1]
            keep = _dropout.keep_mask(seed, threshold, rows, x.shape[-1], branch=0)
            keep = keep.to(dropped.dtype).reshape(x.shape)
            dropped = dropped * keep * _dropout.keep_scale(threshold)
            base = linear(dropped, weight.to(dropped.dtype))
        up = linear(linear(dropped, a), b)
        y: Tensor = (result + (scale - 1) * base + scale * up * SCALING).to(dtype)
        return y

    return Call(leaves, fused, stock, stock, setting.autocast, names)


_BASE = Setting(frozen="weight")
_MIXED = replace(_BASE, x=BF16)

SETTINGS: dict[str, Setting] = {
    "fp32": _BASE,
    "bf16": replace(_BASE, x=BF16, adapter=BF16),
    "fp16": replace(_BASE, x=FP16, adapter=FP16),
    "bf16-base-fp32-adapter": _MIXED,
    "fp32-base-bf16-adapter": replace(_BASE, adapter=BF16),
    "autocast": replace(_BASE, autocast=BF16),
    "dropout": replace(_MIXED, dropout=0.1),
    "dropout-fp32": replace(_BASE, dropout=0.5),
    "dropout-autocast": replace(_BASE, dropout=0.1, autocast=BF16),
    "bias": replace(_MIXED, bias=True),
    "bias-dropout": replace(_MIXED, bias=True, dropout=0.1),
    "trained-base": replace(_MIXED, frozen="", bias=True),
    "trained-base-dropout": replace(_BASE, frozen="", dropout=0.1),
    "frozen-magnitude": replace(_MIXED, frozen="weight magnitude"),
    "frozen-a": replace(_MIXED, frozen="weight a", dropout=0.1),
    "frozen-b": replace(_MIXED, frozen="weight b"),
    "input-without-gradient": replace(_MIXED, frozen="weight x", dropout=0.1),
    "one-row": replace(_MIXED, lead=(1,)),
    "one-dimensional": replace(_MIXED, lead=(), dropout=0.1),
    "empty": replace(_MIXED, lead=(0, 7), dropout=0.1),
    "odd-sizes": replace(_MIXED, lead=(37,), features=77, outputs=53, rank=3, dropout=0.1),
    "rank-64": replace(_MIXED, lead=(70,), rank=64),
    "many-rows": replace(_MIXED, lead=(300,), features=136, outputs=72, rank=16, dropout=0.05),
}

CASES = [
    Case(f"dora_linear-{name}", "dora_linear", partial(_build, setting))
    for name, setting in SETTINGS.items()
]
CASES.append(
    Case(
        "dora_linear-fp64",
        "dora_linear",
        lambda device: _build(
            replace(_BASE, x=FP64, adapter=FP64, dropout=0.1, frozen="", fixed_norm=True), device
        ),
        backends=("reference",),
    )
)

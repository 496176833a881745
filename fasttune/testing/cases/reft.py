"""Cases of reft: dtypes, positions, variants, activations, dropout, frozen parts, shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from fasttune.ops import _dropout
from fasttune.ops._activations import ACTIVATIONS
from fasttune.ops.reft import reft
from fasttune.testing.conformance import Call, Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Setting:
    """One configuration; ``lead`` is h's shape before the features."""

    lead: tuple[int, ...] = (2, 19)
    features: int = 48
    rank: int = 4
    rows: tuple[int, ...] | None = (0, 1, 18, 20, 37, 36, 19)
    h: torch.dtype = FP32
    rotation: torch.dtype = FP32
    source: torch.dtype = FP32
    autocast: torch.dtype | None = None
    difference: bool = True
    activation: str = "identity"
    dropout: float = 0.0
    bias: bool = True
    inplace: bool = False
    frozen: str = ""


def _build(setting: Setting, device: str) -> Call:
    generator = torch.Generator(device).manual_seed(7)
    features, rank = setting.features, setting.rank

    def random(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    tensors = {
        "h": random((*setting.lead, features), setting.h, 1.0),
        "rotation": random((rank, features), setting.rotation, features**-0.5),
        "source": random((rank, features), setting.source, features**-0.5),
    }
    if setting.bias:
        tensors["bias"] = random((rank,), setting.source, 1.0)
    names = list(tensors)
    leaves = [tensor.detach() for tensor in tensors.values()]
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name not in setting.frozen.split())
    seed = torch.tensor(-81985529216486896, device=device)
    rows = (
        None
        if setting.rows is None
        else torch.tensor(setting.rows, dtype=torch.int64, device=device)
    )

    def fused(*leaves: Tensor) -> Tensor:
        own = dict(zip(names, leaves, strict=True))
        # Autograd allows no edit of a leaf: an in-place one gets the output of an operation.
        h = own["h"] + 0 if setting.inplace else own["h"]
        return reft(
            h, own["rotation"], own["source"], own.get("bias"), rows=rows,
            difference=setting.difference, activation=setting.activation,
            dropout_p=setting.dropout, seed=seed, inplace=setting.inplace,
        )  # fmt: skip

    def stock(*leaves: Tensor) -> Tensor:
        """The formula in plain torch: gather, products in the dtypes of the parameters, scatter."""
        own = dict(zip(names, leaves, strict=True))
        flat = own["h"].reshape(-1, features)
        named = torch.arange(len(flat), device=device) if rows is None else rows
        there = named >= 0
        x = flat[named[there]]
        d = linear(x.to(own["source"].dtype), own["source"], own.get("bias"))
        if setting.activation != "identity":
            d = ACTIVATIONS[setting.activation].value(d)
        if setting.difference:
            d = d - linear(x.to(own["rotation"].dtype), own["rotation"])
        y = x + d.to(own["rotation"].dtype) @ own["rotation"]
        if setting.dropout:
            threshold = _dropout.threshold(setting.dropout)
            keep = _dropout.keep_mask(seed, threshold, len(named), features, branch=0)
            y = y * keep[there].to(y.dtype) * _dropout.keep_scale(threshold)
        return flat.index_put((named[there],), y.to(flat.dtype)).reshape(own["h"].shape)

    return Call(leaves, fused, stock, stock, setting.autocast, names)


_BASE = Setting()
_HALF = Setting(h=BF16, rotation=BF16, source=BF16)

SETTINGS: dict[str, Setting] = {
    "fp32": _BASE,
    "bf16": _HALF,
    "fp16": Setting(h=FP16, rotation=FP16, source=FP16),
    "fp32-adapter": Setting(h=BF16),
    "fp32-rotation": Setting(h=BF16, source=BF16),
    "fp32-adapter-fp16": Setting(h=FP16),
    "autocast": replace(_BASE, autocast=BF16),
    "every-row": replace(_BASE, rows=None),
    "every-row-bf16": replace(_HALF, rows=None),
    "no-row-of-some": replace(_HALF, rows=(-1, 3, -1, -1, 37, 0, -1)),
    "no-row-at-all": replace(_BASE, rows=(-1, -1)),
    "empty-list": replace(_BASE, rows=()),
    "no-difference": replace(_BASE, difference=False),
    "no-difference-bf16": replace(_HALF, difference=False),
    "no-bias": replace(_HALF, bias=False),
    **{
        name: replace(_BASE, activation=name)
        for name in ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "tanh", "sigmoid")
    },
    "leaky_relu-no-difference": replace(_HALF, activation="leaky_relu", difference=False),
    "dropout": replace(_BASE, dropout=0.25),
    "dropout-bf16": replace(_HALF, dropout=0.25, activation="silu", rows=(5, -1, 37, 2)),
    "dropout-every-row": replace(_BASE, dropout=0.1, rows=None),
    "inplace": replace(_BASE, inplace=True),
    "inplace-every-row": replace(_BASE, inplace=True, rows=None),
    "frozen-h": replace(_HALF, frozen="h"),
    "frozen-parameters": replace(_HALF, frozen="rotation source bias"),
    "only-bias": replace(_BASE, frozen="h rotation source"),
    "one-dimensional": replace(_HALF, lead=(), rows=(0,)),
    "empty": replace(_HALF, lead=(0, 3), rows=()),
    "rank-one": replace(_BASE, rank=1),
    "odd-sizes": replace(_HALF, lead=(37,), features=77, rank=5, rows=(36, 0, 7), dropout=0.1),
    "wide": replace(_BASE, lead=(5,), features=1100, rank=96, rows=(0, 4, 2)),
    "many-rows": replace(_HALF, lead=(67,), features=80, rank=20, rows=None),
}

CASES = [Case(f"reft-{name}", "reft", partial(_build, item)) for name, item in SETTINGS.items()]
_EXACT = replace(_BASE, lead=(4,), features=9, rank=3, h=FP64, rotation=FP64, source=FP64)
CASES += [
    Case(f"reft-{name}", "reft", partial(_build, setting), backends=("reference",))
    for name, setting in (
        ("fp64", replace(_EXACT, rows=(3, -1, 0), activation="tanh")),
        ("every-row-fp64", replace(_EXACT, rows=None, dropout=0.2)),
        ("no-difference-fp64", replace(_EXACT, rows=(1, 2), difference=False)),
    )
]

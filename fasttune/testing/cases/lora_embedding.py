"""Cases of lora_embedding: dtypes, several adapters, frozen parts, repeated ids, shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from fasttune.ops.lora_embedding import lora_embedding
from fasttune.ops.lora_linear import LoraBranch
from fasttune.testing.conformance import Call, Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Setting:
    """One configuration; ``lead`` is the shape of the ids."""

    lead: tuple[int, ...] = (3, 21)
    features: int = 72
    vocabulary: int = 101
    ranks: tuple[int, ...] = (8,)
    base: torch.dtype = FP32
    adapter: torch.dtype = FP32
    tensor_scaling: bool = False
    different: int = 101  # ids are drawn from so many
    id_dtype: torch.dtype = torch.int64
    padding_idx: int | None = None
    strided_a: bool = False
    frozen: str = ""  # names of leaves that need no gradient
    autocast: torch.dtype | None = None


def _build(setting: Setting, device: str) -> Call:
    generator = torch.Generator(device).manual_seed(8)

    def random(shape: tuple[int, ...], dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    ids = torch.randint(setting.different, setting.lead, generator=generator, device=device)
    ids = ids.to(setting.id_dtype)
    leaves, names = [random((*setting.lead, setting.features), setting.base)], ["base"]
    scalings: list[float | Tensor] = []
    for j, rank in enumerate(setting.ranks):
        if setting.strided_a:
            a = random((setting.vocabulary, rank), setting.adapter).t()
        else:
            a = random((rank, setting.vocabulary), setting.adapter)
        leaves += [a, random((setting.features, rank), setting.adapter, rank**-0.5)]
        names += [f"a{j}", f"b{j}"]
        scale = 0.5 + j
        scalings.append(torch.tensor(scale, device=device) if setting.tensor_scaling else scale)
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name not in setting.frozen.split())

    def fused(base: Tensor, *factors: Tensor) -> Tensor:
        pairs = zip(factors[::2], factors[1::2], scalings, strict=True)
        branches = [LoraBranch(a, b, scale) for a, b, scale in pairs]
        return lora_embedding(base, ids, branches, padding_idx=setting.padding_idx)

    def stock(base: Tensor, *factors: Tensor) -> Tensor:
        y = base
        for a, b, scale in zip(factors[::2], factors[1::2], scalings, strict=True):
            looked_up = functional.embedding(ids, a.t(), padding_idx=setting.padding_idx)
            y = y + (looked_up @ b.t()) * scale
        return y.to(base.dtype)

    return Call(leaves, fused, stock, stock, setting.autocast, names)


_BASE = Setting()
_HALF = Setting(base=BF16, adapter=BF16)

SETTINGS: dict[str, Setting] = {
    "fp32": _BASE,
    "bf16": _HALF,
    "fp16": replace(_BASE, base=FP16, adapter=FP16),
    "bf16-base-fp32-adapter": replace(_BASE, base=BF16),
    "fp16-base-fp32-adapter": replace(_BASE, base=FP16),
    "fp32-base-bf16-adapter": replace(_BASE, adapter=BF16),
    "autocast": replace(_BASE, autocast=BF16),
    "autocast-bf16-base": replace(_BASE, base=BF16, autocast=BF16),
    "two-adapters": replace(_BASE, ranks=(8, 3)),
    "two-adapters-bf16-base": replace(_BASE, base=BF16, ranks=(4, 16)),
    "tensor-scaling": replace(_BASE, tensor_scaling=True, base=BF16),
    # Ids.
    "one-id": replace(_BASE, different=1, base=BF16),
    "few-ids": replace(_HALF, different=4),
    "int32-ids": replace(_BASE, id_dtype=torch.int32),
    "padding": replace(_BASE, padding_idx=2, different=5),
    # Partial training.
    "frozen-a": replace(_BASE, frozen="a0"),
    "frozen-b": replace(_BASE, frozen="b0", base=BF16),
    "frozen-base": replace(_BASE, frozen="base", base=BF16),
    "frozen-adapter": replace(_BASE, frozen="a0 b0"),
    "one-of-two-trains": replace(_BASE, ranks=(8, 3), frozen="base a0 b0"),
    # Shapes.
    "one-dimensional": replace(_BASE, lead=(5,)),
    "one-token": replace(_HALF, lead=(1, 1)),
    "three-dimensional-ids": replace(_BASE, lead=(2, 3, 5)),
    "empty": replace(_BASE, lead=(0, 7)),
    "rank-one-odd-sizes": replace(_HALF, ranks=(1,), features=53, vocabulary=37, different=37),
    "strided-a": replace(_BASE, strided_a=True),
    "many-tokens": replace(_BASE, lead=(1100,), features=24, base=BF16, vocabulary=503),
}

CASES = [
    Case(f"lora_embedding-{name}", "lora_embedding", partial(_build, setting))
    for name, setting in SETTINGS.items()
]
_EXACT = replace(_BASE, base=FP64, adapter=FP64, lead=(7,), features=9, vocabulary=6, different=6)
CASES += [
    Case(f"lora_embedding-{name}", "lora_embedding", partial(_build, setting), ("reference",))
    for name, setting in (
        ("fp64", _EXACT),
        ("padding-fp64", replace(_EXACT, padding_idx=1, frozen="a0")),
    )
]

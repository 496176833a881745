"""Cases of lora_segmented: assignments, ranks, dtypes, dropout, autocast, frozen parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from fasttune.ops import LoraBranch, _dropout, lora_segmented
from fasttune.ops._lora_segmented_plan import plan
from fasttune.testing.conformance import Call, Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Setting:
    """One configuration; ``lead`` is x's shape before the features."""

    lead: tuple[int, ...] = (5, 7)
    features: int = 48
    outputs: int = 40
    ranks: tuple[int, ...] = (4, 8, 16)
    rows_of: tuple[int, ...] = (0, 2, -1, 1, 0)
    x: torch.dtype = FP32
    weight: torch.dtype = FP32
    adapter: torch.dtype = FP32
    autocast: torch.dtype | None = None
    dropout: tuple[float, ...] = (0.0,)  # in turn
    bias: bool = False
    lora_bias: bool = False
    scaling_tensor: bool = False
    strided: bool = False
    frozen: str = "weight bias"


def _build(setting: Setting, device: str) -> Call:
    generator = torch.Generator(device).manual_seed(11)
    k, n = setting.features, setting.outputs

    def random(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    wide = random((*setting.lead, 2 * k if setting.strided else k), setting.x, 1.0)
    leaves = {"x": wide[..., :k], "weight": random((n, k), setting.weight, k**-0.5)}
    if setting.bias:
        leaves["bias"] = random((n,), setting.weight, 1.0)
    for j, rank in enumerate(setting.ranks):
        leaves[f"a{j}"] = random((rank, k), setting.adapter, k**-0.5)
        leaves[f"b{j}"] = random((n, rank), setting.adapter, rank**-0.5)
        if setting.lora_bias:
            leaves[f"lora_bias{j}"] = random((n,), setting.adapter, 1.0)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in setting.frozen.split())
    seed = torch.tensor(-81985529216486896, device=device)

    def given(
        tensors: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor | None, list[LoraBranch]]:
        named = dict(zip(leaves, tensors, strict=True))
        branches = []
        for j in range(len(setting.ranks)):
            scale: float | Tensor = 1.5 - j / 4
            if setting.scaling_tensor:
                scale = torch.tensor(scale, device=device)
            p = setting.dropout[j % len(setting.dropout)]
            branch = LoraBranch(named[f"a{j}"], named[f"b{j}"], scale, None, p)
            branches.append(replace(branch, bias=named.get(f"lora_bias{j}")))
        return named["x"], named["weight"], named.get("bias"), branches

    def fused(*tensors: Tensor) -> Tensor:
        x, weight, bias, branches = given(tensors)
        return lora_segmented(x, weight, branches, setting.rows_of, bias=bias, seed=seed)

    def stock(*tensors: Tensor) -> Tensor:
        """LoraLayer._mixed_batch_forward of PEFT, row by row, with the mask of the seed."""
        x, weight, bias, branches = given(tensors)
        result = linear(x, weight, bias)
        y, rows = result.flatten(0, -2), x.flatten(0, -2)
        chosen = plan(setting.rows_of, len(rows))
        for start, stop, position in chosen.segments:
            j = chosen.used[position]
            branch = branches[j]
            places = torch.arange(start, stop, device=device)
            if chosen.order is not None:
                places = torch.tensor(chosen.order[start:stop], device=device)
            limit = _dropout.threshold(branch.dropout_p)
            facts = (seed, limit, stop - start, k)
            keep = _dropout.keep_mask(*facts, branch=j, row_offset=start).to(branch.a.dtype)
            dropped = rows[places].to(branch.a.dtype) * keep * _dropout.keep_scale(limit)
            up = linear(linear(dropped, branch.a), branch.b, branch.bias) * branch.scaling
            y = y.index_add(0, places, up.to(y.dtype))
        return y.view(result.shape)

    return Call(list(leaves.values()), fused, stock, stock, setting.autocast, list(leaves))


_BASE = Setting()
_MIXED = Setting(x=BF16, weight=BF16)
_COVERED = (1, 1, 0, 2, 0)
_BY_ROW = tuple((7 * i) % 4 - 1 for i in range(70))  # 70 segments: gathered

SETTINGS: dict[str, Setting] = {
    "fp32": _BASE,
    "bf16": replace(_BASE, x=BF16, weight=BF16, adapter=BF16),
    "fp16": replace(_BASE, x=FP16, weight=FP16, adapter=FP16),
    "bf16-base-fp32-adapter": _MIXED,
    "fp32-base-bf16-adapter": replace(_BASE, adapter=BF16),
    "autocast-bf16-fp32-model": replace(_BASE, autocast=BF16),
    "autocast-bf16-fp32-input-bf16-base": replace(_MIXED, x=FP32, autocast=BF16),
    "every-row-fp32": replace(_BASE, rows_of=_COVERED, bias=True, lora_bias=True),
    "every-row": replace(_MIXED, rows_of=_COVERED, bias=True, lora_bias=True),
    "every-row-bf16": replace(_BASE, x=BF16, weight=BF16, adapter=BF16, rows_of=_COVERED),
    "every-row-autocast": replace(_BASE, rows_of=_COVERED, autocast=BF16),
    "every-row-dropout": replace(_MIXED, rows_of=_COVERED, dropout=(0.1, 0.0, 0.5)),
    "dropout": replace(_MIXED, dropout=(0.1, 0.0, 0.5)),
    "dropout-fp32": replace(_BASE, dropout=(0.1, 0.0, 0.5)),
    "biases": replace(_MIXED, bias=True, lora_bias=True, dropout=(0.1,), frozen="weight"),
    "scaling-tensor": replace(_MIXED, scaling_tensor=True, lora_bias=True),
    "trained-base-fp32": replace(_BASE, bias=True, frozen=""),
    "trained-base": replace(_MIXED, bias=True, frozen="", dropout=(0.1,)),
    "frozen-factors": replace(_MIXED, frozen="weight a0 b1"),
    "input-without-gradient": replace(_MIXED, frozen="weight x"),
    "by-row": replace(_MIXED, lead=(35,), rows_of=_BY_ROW[:35], dropout=(0.1,)),
    "gathered": replace(_MIXED, lead=(2, 35), rows_of=_BY_ROW, dropout=(0.1, 0.5), lora_bias=True),
    "gathered-fp32": replace(_BASE, lead=(70,), rows_of=_BY_ROW, bias=True),
    "gathered-bf16": replace(_BASE, lead=(70,), rows_of=_BY_ROW, x=BF16, weight=BF16, adapter=BF16),
    "wide-ranks": replace(_MIXED, ranks=(200, 4, 33), dropout=(0.1, 0.0, 0.5), lora_bias=True),
    "long-runs": replace(_MIXED, lead=(7, 70), ranks=(8, 3, 16), rows_of=(0, 0, -1, 0, 1, 0, 2)),
    "strided": replace(_MIXED, strided=True, dropout=(0.1,)),
    "eight-adapters": replace(
        _MIXED,
        lead=(9, 5),
        ranks=(4, 8, 16, 4, 8, 16, 1, 3),
        rows_of=(3, 0, 7, -1, 5, 6, 2, 1, 4),
    ),
}

CASES = [
    Case(f"lora_segmented-{name}", "lora_segmented", partial(_build, setting))
    for name, setting in SETTINGS.items()
]
CASES += [
    Case(
        f"lora_segmented-{name}-fp64",
        "lora_segmented",
        partial(_build, replace(setting, x=FP64, weight=FP64, adapter=FP64)),
        backends=("reference",),
    )
    for name, setting in (
        ("segments", replace(_BASE, lead=(5, 2), dropout=(0.1,), lora_bias=True, features=12)),
        ("gathered", replace(_BASE, lead=(70,), rows_of=_BY_ROW, features=8, outputs=6)),
    )
]

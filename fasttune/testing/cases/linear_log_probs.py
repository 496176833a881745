"""Cases of linear_log_probs: dtypes, trained heads, ignored rows, shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fasttune.ops.linear_log_probs import linear_log_probs
from fasttune.testing.conformance import Call, Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Setting:
    """One configuration; ``lead`` is the shape of the targets."""

    lead: tuple[int, ...] = (2, 33)
    hidden: int = 24
    vocab: int = 301
    dtype: torch.dtype = FP32
    weight: torch.dtype | None = None
    autocast: torch.dtype | None = None
    logit_scale: float = 1.0
    softcap: float = 0.0
    bias: bool = False
    ignored: float = 0.2
    train_head: bool = False
    frozen_hidden: bool = False


def _build(setting: Setting, device: str) -> Call:
    generator = torch.Generator(device).manual_seed(9)

    def random(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    head_dtype = setting.weight or setting.dtype
    hidden = random((*setting.lead, setting.hidden), setting.dtype, 1.0)
    hidden.requires_grad_(not setting.frozen_hidden)
    weight = random((setting.vocab, setting.hidden), head_dtype, 3 * setting.hidden**-0.5)
    leaves, names = [hidden, weight.requires_grad_(setting.train_head)], ["hidden", "weight"]
    if setting.bias:
        bias = random((setting.vocab,), head_dtype, 1.0)
        leaves.append(bias.requires_grad_(setting.train_head))
        names.append("bias")
    targets = torch.randint(0, setting.vocab, setting.lead, generator=generator, device=device)
    drop = torch.rand(setting.lead, generator=generator, device=device) < setting.ignored
    targets = targets.masked_fill(drop, -100)

    def fused(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_log_probs(
            hidden, weight, targets, bias=bias, logit_scale=setting.logit_scale,
            softcap=setting.softcap,
        )  # fmt: skip

    def stock(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight, bias)
        z = logits.to(torch.promote_types(logits.dtype, FP32)) * setting.logit_scale
        if setting.softcap:
            z = torch.tanh(z / setting.softcap) * setting.softcap
        valid = targets != -100
        found = torch.log_softmax(z, -1).gather(-1, targets.where(valid, 0)[..., None])[..., 0]
        return found * valid

    return Call(leaves, fused, stock, stock, setting.autocast, names)


_BASE = Setting()
_HALF = Setting(dtype=BF16)

SETTINGS: dict[str, Setting] = {
    "fp32": _BASE,
    "bf16": _HALF,
    "fp16": replace(_BASE, dtype=FP16),
    "autocast": replace(_BASE, autocast=BF16),
    "autocast-trained": replace(_BASE, autocast=BF16, train_head=True, bias=True),
    "bias": replace(_BASE, bias=True),
    "trained": replace(_BASE, bias=True, train_head=True),
    "trained-bf16": replace(_HALF, bias=True, train_head=True),
    "frozen-hidden": replace(_BASE, train_head=True, frozen_hidden=True),
    "scale-and-softcap": replace(_BASE, logit_scale=0.5, softcap=5.0),
    "nothing-ignored": replace(_HALF, ignored=0.0),
    "all-ignored": replace(_BASE, ignored=1.0, train_head=True),
    "one-row": replace(_BASE, lead=(), ignored=0.0),
    "empty": replace(_BASE, lead=(0, 3)),
    "choices": replace(_BASE, lead=(2, 3, 11), vocab=97),
}

CASES = [
    Case(f"linear_log_probs-{name}", "linear_log_probs", partial(_build, setting))
    for name, setting in SETTINGS.items()
]
_EXACT = replace(_BASE, dtype=FP64, lead=(5,), hidden=6, vocab=11, bias=True, train_head=True)
CASES += [
    Case(f"linear_log_probs-{name}", "linear_log_probs", partial(_build, setting),
         backends=("reference",))
    for name, setting in (
        ("fp64", _EXACT),
        ("softcap-fp64", replace(_EXACT, softcap=3.0)),
        ("frozen-head-fp64", replace(_EXACT, train_head=False)),
    )
]  # fmt: skip

"""Cases of linear_cross_entropy: dtypes, losses, reductions, LoRA on the head, ignored rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from fasttune.ops import CrossEntropy, LoraBranch, _dropout, linear_cross_entropy
from fasttune.testing.conformance import Call, Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


_PLAIN = CrossEntropy()


@dataclass(frozen=True)
class Setting:
    """One configuration; ``lead`` is the shape of the targets."""

    lead: tuple[int, ...] = (2, 33)
    hidden: int = 24
    vocab: int = 301
    dtype: torch.dtype = FP32
    weight: torch.dtype | None = None
    autocast: torch.dtype | None = None
    loss: CrossEntropy = _PLAIN
    reduction: str = "mean"
    items: int | None = None
    bias: bool = False
    rank: int = 0
    dropout: float = 0.0
    ignored: float = 0.2
    train_weight: bool = False


def _build(setting: Setting, device: str) -> Call:
    generator = torch.Generator(device).manual_seed(7)

    def random(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    weight_dtype = setting.weight or setting.dtype
    hidden = random((*setting.lead, setting.hidden), setting.dtype, 1.0).requires_grad_()
    weight = random((setting.vocab, setting.hidden), weight_dtype, 3 * setting.hidden**-0.5)
    leaves, names = [hidden, weight.requires_grad_(setting.train_weight)], ["hidden", "weight"]
    if setting.bias:
        leaves.append(
            random((setting.vocab,), weight_dtype, 1.0).requires_grad_(setting.train_weight)
        )
        names.append("bias")
    if setting.rank:
        leaves.append(
            random((setting.rank, setting.hidden), FP32, setting.hidden**-0.5).requires_grad_()
        )
        leaves.append(
            random((setting.vocab, setting.rank), FP32, setting.rank**-0.5).requires_grad_()
        )
        names += ["a", "b"]
    targets = torch.randint(0, setting.vocab, setting.lead, generator=generator, device=device)
    drop = torch.rand(setting.lead, generator=generator, device=device) < setting.ignored
    targets = targets.masked_fill(drop, setting.loss.ignore_index)
    seed = torch.tensor(123456789012345, device=device)

    def parts(tensors: tuple[Tensor, ...]) -> tuple[Tensor | None, list[LoraBranch]]:
        rest = list(tensors[2:])
        bias = rest.pop(0) if setting.bias else None
        branches = (
            [LoraBranch(rest[0], rest[1], 0.5, None, setting.dropout)] if setting.rank else []
        )
        return bias, branches

    def fused(*tensors: Tensor) -> Tensor:
        bias, branches = parts(tensors)
        loss = linear_cross_entropy(
            tensors[0],
            tensors[1],
            targets,
            bias=bias,
            branches=branches,
            row_loss=setting.loss,
            reduction=setting.reduction,
            num_items_in_batch=setting.items,
            seed=seed,
        )
        assert isinstance(loss, Tensor)
        return loss

    def stock(*tensors: Tensor) -> Tensor:
        bias, branches = parts(tensors)
        h = tensors[0].reshape(-1, setting.hidden)
        logits = linear(h, tensors[1], bias)
        for branch in branches:
            threshold = _dropout.threshold(branch.dropout_p)
            keep = _dropout.keep_mask(seed, threshold, *h.shape, branch=0)
            dropped = (
                h.to(branch.a.dtype) * keep.to(branch.a.dtype) * _dropout.keep_scale(threshold)
            )
            up = linear(linear(dropped, branch.a), branch.b)
            logits = (logits + up * branch.scaling).to(logits.dtype)
        z = logits.to(torch.promote_types(logits.dtype, FP32)) * setting.loss.logit_scale
        if setting.loss.softcap:
            z = torch.tanh(z / setting.loss.softcap) * setting.loss.softcap
        flat, index = targets.reshape(-1), setting.loss.ignore_index
        summed = torch.nn.functional.cross_entropy(
            z,
            flat,
            ignore_index=index,
            reduction="sum",
            label_smoothing=setting.loss.label_smoothing,
        )
        valid = flat != index
        summed = summed + setting.loss.z_loss * (z.logsumexp(-1).square() * valid).sum()
        if setting.items is not None:
            return summed / setting.items
        return summed / valid.sum() if setting.reduction == "mean" else summed

    # A logit is off by about one rounding of the compute dtype (operands and result), a row's loss
    # by as much, and a sum of n independent rows by sqrt(n) of it: two standard deviations of that.
    with torch.no_grad():
        largest = float((hidden.double() @ weight.double().t()).abs().max())
        terms = max(int((targets != setting.loss.ignore_index).sum()), 1)
        share = 1.0 if setting.reduction == "sum" else 1.0 / (setting.items or terms)
    unit = torch.finfo(setting.autocast or setting.dtype).eps / 2
    floor = 2 * unit * largest * share * terms**0.5
    return Call(leaves, fused, stock, stock, setting.autocast, names, floor)


_BASE = Setting()
_EVERYTHING = CrossEntropy(
    ignore_index=-1, logit_scale=0.7, softcap=5.0, label_smoothing=0.1, z_loss=1e-2
)

SETTINGS: dict[str, Setting] = {
    "fp32": _BASE,
    "bf16": replace(_BASE, dtype=BF16),
    "fp16": replace(_BASE, dtype=FP16),
    "autocast": replace(_BASE, autocast=BF16),
    "autocast-trained": replace(_BASE, autocast=BF16, train_weight=True, bias=True),
    "trained": replace(_BASE, train_weight=True, bias=True),
    "trained-bf16": replace(_BASE, dtype=BF16, train_weight=True, bias=True),
    "trained-fp16": replace(_BASE, dtype=FP16, train_weight=True),
    "sum": replace(_BASE, reduction="sum"),
    "num-items": replace(_BASE, items=17),
    "softcap": replace(_BASE, loss=CrossEntropy(softcap=3.0, logit_scale=1.3)),
    "label-smoothing": replace(_BASE, loss=CrossEntropy(label_smoothing=0.2)),
    "z-loss": replace(_BASE, loss=CrossEntropy(z_loss=1e-2)),
    "everything": replace(_BASE, loss=_EVERYTHING, bias=True, train_weight=True),
    "everything-bf16": replace(_BASE, loss=_EVERYTHING, dtype=BF16, bias=True, train_weight=True),
    "lora-head": replace(_BASE, rank=4, bias=True),
    "lora-head-bf16": replace(_BASE, dtype=BF16, rank=4),
    "lora-head-dropout": replace(_BASE, rank=5, dropout=0.2, dtype=BF16),
    "one-row": replace(_BASE, lead=(1,), ignored=0.0),
    "no-row-ignored": replace(_BASE, ignored=0.0, dtype=BF16),
    "wide": replace(_BASE, lead=(5,), vocab=9001, dtype=BF16, ignored=0.0),
    "several-chunks": replace(_BASE, lead=(150,), vocab=70001, hidden=8, train_weight=True),
}

CASES = [
    Case(f"linear_cross_entropy-{name}", "linear_cross_entropy", partial(_build, setting))
    for name, setting in SETTINGS.items()
]
CASES.append(
    Case(
        "linear_cross_entropy-fp64",
        "linear_cross_entropy",
        lambda device: _build(replace(_BASE, dtype=FP64, loss=_EVERYTHING), device),
        backends=("reference",),
    )
)

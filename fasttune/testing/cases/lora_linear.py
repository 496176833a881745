"""Cases of lora_linear: shapes, dtypes, adapters, dropout, autocast, frozen parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from fasttune.ops import LoraBranch, LoraProjection, _dropout, lora_linear_group
from fasttune.testing.conformance import WITH_CUDA, WITHOUT_CUDA, Call, Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Setting:
    """One configuration; ``lead`` is x's shape before the features."""

    lead: tuple[int, ...] = (2, 19)
    features: int = 48
    outputs: int = 40
    ranks: tuple[int, ...] = (8,)
    x: torch.dtype = FP32
    weight: torch.dtype = FP32
    adapter: torch.dtype = FP32
    autocast: torch.dtype | None = None
    dropout: float = 0.0
    bias: bool = False
    lora_bias: bool = False
    scales: str = ""  # of "rank" and "out", the trained vectors that scale each branch
    scaling_tensor: bool = False
    strided: bool = False
    frozen: str = ""  # names of leaves that need no gradient, besides the weight
    train_weight: bool = False
    opaque: bool = False  # in place of the weight, what a base layer's own forward returned
    conv1d: bool = False  # the weight is stored [K, N]


def _build(setting: Setting, device: str) -> Call:
    names = ["x", "weight"]
    generator = torch.Generator(device).manual_seed(11)

    def random(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    shape = (*setting.lead, setting.features)
    if setting.strided:
        x = random((*shape[:-1], 2 * setting.features), setting.x, 1.0)[..., : setting.features]
    else:
        x = random(shape, setting.x, 1.0)
    base = (setting.outputs, setting.features)
    if setting.conv1d or setting.opaque:
        base = (setting.features if setting.conv1d else x.shape[:-1].numel(), setting.outputs)
    weight = random(base, setting.weight, 1.0 if setting.opaque else setting.features**-0.5)
    leaves = [x, weight.view(*x.shape[:-1], -1) if setting.opaque else weight]
    if setting.bias:
        leaves.append(random((setting.outputs,), setting.weight, 1.0))
        names.append("bias")
    for j, rank in enumerate(setting.ranks):
        leaves.append(random((rank, setting.features), setting.adapter, setting.features**-0.5))
        leaves.append(random((setting.outputs, rank), setting.adapter, rank**-0.5))
        names += [f"a{j}", f"b{j}"]
        if setting.lora_bias:
            leaves.append(random((setting.outputs,), setting.adapter, 1.0))
            names.append(f"lora_bias{j}")
        for scale_name in setting.scales.split():
            size = rank if scale_name == "rank" else setting.outputs
            leaves.append(random((size,), setting.adapter, 1.0))
            names.append(f"{scale_name}_scale{j}")
    frozen = [*setting.frozen.split(), "bias"]
    if not (setting.train_weight or setting.opaque):
        frozen.append("weight")
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name not in frozen)
    seed = torch.tensor(-81985529216486896, device=device)  # bits in both halves, and the sign
    scale: float | Tensor = torch.tensor(1.5, device=device) if setting.scaling_tensor else 1.5

    def projection(tensors: tuple[Tensor, ...]) -> LoraProjection:
        rest = list(tensors[1:])
        weight, bias = rest.pop(0), rest.pop(0) if setting.bias else None
        branches = []
        for _ in setting.ranks:
            a, b = rest.pop(0), rest.pop(0)
            lora_bias = rest.pop(0) if setting.lora_bias else None
            scales = {f"{name}_scale": rest.pop(0) for name in setting.scales.split()}
            branches.append(LoraBranch(a, b, scale, lora_bias, setting.dropout, **scales))
        if setting.opaque:
            return LoraProjection(None, None, tuple(branches), base=weight)
        return LoraProjection(weight.t() if setting.conv1d else weight, bias, tuple(branches))

    def fused(*tensors: Tensor) -> Tensor:
        return lora_linear_group(tensors[0], [projection(tensors)], seed=seed)[0]

    def stock(*tensors: Tensor) -> Tensor:
        """peft.tuners.lora.layer.Linear.forward, with the mask of the seed."""
        x, given = tensors[0], projection(tensors)
        result = given.base
        if given.weight is not None:
            result = linear(x, given.weight, given.bias)
        assert result is not None
        dtype = result.dtype
        for j, branch in enumerate(given.branches):
            threshold = _dropout.threshold(branch.dropout_p)
            rows = x.numel() // x.shape[-1]
            keep = _dropout.keep_mask(seed, threshold, rows, x.shape[-1], branch=j)
            keep = keep.to(branch.a.dtype).expand(rows, x.shape[-1]).reshape(x.shape)
            dropped = x.to(branch.a.dtype) * keep * _dropout.keep_scale(threshold)
            down = linear(dropped, branch.a)
            if branch.rank_scale is not None:
                down = branch.rank_scale * down
            up = linear(down, branch.b)
            if branch.out_scale is not None:
                up = branch.out_scale * up
            if branch.bias is not None:
                up = up + branch.bias
            result = result + up * branch.scaling
        return result.to(dtype)

    return Call(leaves, fused, stock, stock, setting.autocast, names)


_BASE = Setting()
_MIXED = Setting(x=BF16, weight=BF16, adapter=FP32)
_BF16 = Setting(x=BF16, weight=BF16, adapter=BF16)
_FP16 = Setting(x=FP16, weight=FP16, adapter=FP16)

# Beside what they take of the rest, see CUDA_TOO.
OF_CUDA: dict[str, Setting] = {
    "bf16": _BF16,
    "fp16": _FP16,
    "bf16-dropout": replace(_BF16, dropout=0.1, ranks=(16,)),
    "bf16-biases": replace(_BF16, bias=True, lora_bias=True, scaling_tensor=True),
    "fp16-scaling-tensor": replace(_FP16, scaling_tensor=True, ranks=(24,)),
    "bf16-frozen-a": replace(_BF16, frozen="a0", dropout=0.1),
    "bf16-frozen-b": replace(_BF16, frozen="b0", dropout=0.1),
    "bf16-input-without-gradient": replace(_BF16, frozen="x"),
    "bf16-trained-base": replace(_BF16, train_weight=True),
    "bf16-one-dimensional": replace(_BF16, lead=()),
    "bf16-empty": replace(_BF16, lead=(0, 7), dropout=0.1),
    "bf16-strided": replace(_BF16, strided=True, dropout=0.1),
    "bf16-in-splits": replace(_BF16, lead=(70,), features=1088, ranks=(64,)),
    "fp16-many-rows": replace(_FP16, lead=(600,), outputs=72, ranks=(16,), dropout=0.05),
    "fp32-adapter-dropout": replace(_MIXED, dropout=0.1, ranks=(16,)),
    "fp32-adapter-in-splits": replace(_MIXED, lead=(70,), features=1088, ranks=(16,), dropout=0.1),
}

# The CUDA C++ kernels take x of 16 bits, factors of its dtype or, beside bf16, up to rank 16 in
# fp32, and multiples of 8.
CUDA_TOO = {
    "bf16-base-fp32-adapter", "autocast-bf16-bf16-base-fp32-adapter", "dropout", "biases",
    "scaling-tensor", "conv1d-bf16", "frozen-a", "frozen-b", "input-without-gradient",
    "trained-base", "vera", "scales-bf16", "rank-scale", "one-dimensional", "one-row", "empty",
    "strided", "many-rows",
}  # fmt: skip

SETTINGS: dict[str, Setting] = {
    # The precision table of docs/precision.md, one row each.
    "fp32": _BASE,
    **OF_CUDA,
    "bf16-base-fp32-adapter": _MIXED,
    "fp16-base-fp32-adapter": replace(_BASE, x=FP16, weight=FP16),
    "fp32-base-bf16-adapter": replace(_BASE, adapter=BF16),
    "autocast-bf16-fp32-model": replace(_BASE, autocast=BF16),
    "autocast-bf16-bf16-base-fp32-adapter": replace(_MIXED, autocast=BF16),
    "autocast-bf16-fp32-input-bf16-base": replace(_MIXED, x=FP32, autocast=BF16),
    "autocast-fp16-fp32-model": replace(_BASE, autocast=FP16),
    # Dropout, several adapters, biases, scalings.
    "dropout": replace(_MIXED, dropout=0.1),
    "dropout-fp32": replace(_BASE, dropout=0.5),
    "dropout-autocast": replace(_BASE, dropout=0.1, autocast=BF16),
    "two-adapters": replace(_MIXED, ranks=(4, 9), dropout=0.1),
    "two-adapters-fp32": replace(_BASE, ranks=(4, 9)),
    "biases": replace(_MIXED, bias=True, lora_bias=True, dropout=0.1),
    "biases-fp32": replace(_BASE, bias=True, lora_bias=True),
    "scaling-tensor": replace(_MIXED, scaling_tensor=True, lora_bias=True),
    # The output of a base with a forward of its own, and a weight stored [K, N].
    "opaque": replace(_BASE, opaque=True),
    "opaque-bf16": replace(_MIXED, opaque=True, dropout=0.1, ranks=(4, 9), lora_bias=True),
    "opaque-fp32-base-of-bf16": replace(_MIXED, opaque=True, weight=FP32),
    "conv1d": replace(_BASE, conv1d=True, bias=True, train_weight=True),
    "conv1d-bf16": replace(_MIXED, conv1d=True, train_weight=True, dropout=0.1),
    # Partial training.
    "frozen-a": replace(_MIXED, frozen="a0"),
    "frozen-b": replace(_MIXED, frozen="b0"),
    "input-without-gradient": replace(_MIXED, frozen="x"),
    "trained-base": replace(_MIXED, train_weight=True),
    "trained-base-fp32": replace(_BASE, train_weight=True, dropout=0.1),
    # Scaled ranks and outputs: both factors frozen (VeRA), both trained, one of the vectors.
    "vera": replace(_MIXED, ranks=(16,), frozen="a0 b0", scales="rank out", dropout=0.1),
    "vera-fp32": replace(_BASE, ranks=(16, 9), frozen="a0 b0 a1 b1", scales="rank out", bias=True),
    "scales": replace(_BASE, scales="rank out", lora_bias=True),
    "scales-bf16": replace(_BASE, x=BF16, weight=BF16, adapter=BF16, scales="rank out"),
    "scales-autocast": replace(_BASE, scales="rank out", autocast=BF16, dropout=0.1),
    "rank-scale": replace(_MIXED, scales="rank", scaling_tensor=True, dropout=0.1),
    "out-scale-opaque": replace(_MIXED, scales="out", opaque=True, ranks=(4, 9)),
    "frozen-scales": replace(
        _BASE, frozen="a0 b0 rank_scale0 out_scale0", scales="rank out", train_weight=True
    ),
    # Shapes.
    "one-dimensional": replace(_MIXED, lead=()),
    "four-dimensional": replace(_BASE, lead=(2, 3, 5)),
    "one-row": replace(_MIXED, lead=(1,), dropout=0.1),
    "empty": replace(_MIXED, lead=(0, 7), dropout=0.1),
    "odd-sizes": replace(_MIXED, lead=(37,), features=77, outputs=53, ranks=(3,), dropout=0.1),
    "odd-sizes-fp32": replace(_BASE, lead=(37,), features=77, outputs=53, ranks=(17,), dropout=0.1),
    "rank-1": replace(_MIXED, ranks=(1,)),
    "rank-64": replace(_MIXED, ranks=(64,), lead=(70,)),
    "strided": replace(_MIXED, strided=True, dropout=0.1),
    "many-rows": replace(_MIXED, lead=(300,), features=136, outputs=72, ranks=(16,), dropout=0.05),
}

CASES = [
    Case(
        f"lora_linear-{name}",
        "lora_linear",
        partial(_build, setting),
        backends=WITH_CUDA if name in OF_CUDA or name in CUDA_TOO else WITHOUT_CUDA,
    )
    for name, setting in SETTINGS.items()
]
CASES.append(
    Case(
        "lora_linear-fp64",
        "lora_linear",
        lambda device: _build(
            replace(_BASE, x=FP64, weight=FP64, adapter=FP64, dropout=0.1), device
        ),
        backends=("reference",),
    )
)

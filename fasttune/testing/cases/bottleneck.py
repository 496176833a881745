"""Cases of bottleneck: dtypes, activations, scales, residuals, dropout, frozen parts, shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from fasttune.ops import _dropout
from fasttune.ops._activations import ACTIVATIONS
from fasttune.ops.bottleneck import bottleneck
from fasttune.testing.conformance import WITH_CUDA, Call, Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Setting:
    """One configuration; ``lead`` is x's shape before the features."""

    lead: tuple[int, ...] = (2, 19)
    features: int = 48
    outputs: int = 48
    width: int = 8
    x: torch.dtype = FP32
    adapter: torch.dtype = FP32
    autocast: torch.dtype | None = None
    activation: str = "relu"
    residual: str = "x"  # "x", "other" or "": none
    scale: str = ""  # "scalar", "channels", or "": a float
    dropout: float = 0.0
    bias: bool = True
    frozen: str = ""
    strided: bool = False  # every operand lies in a wider tensor, weights transposed


def _build(setting: Setting, device: str) -> Call:
    generator = torch.Generator(device).manual_seed(7)
    features, outputs, width = setting.features, setting.outputs, setting.width

    def random(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    tensors = {
        "x": random((*setting.lead, features), setting.x, 1.0),
        "down": random((width, features), setting.adapter, features**-0.5),
        "up": random((outputs, width), setting.adapter, width**-0.5),
    }
    if setting.bias:
        tensors["down_bias"] = random((width,), setting.adapter, 1.0)
        tensors["up_bias"] = random((outputs,), setting.adapter, 1.0)
    if setting.residual == "other":
        tensors["residual"] = random((*setting.lead, outputs), setting.x, 1.0)
    if setting.scale:
        size = 1 if setting.scale == "scalar" else outputs
        tensors["scale"] = random((size,), setting.adapter, 0.3) + 1
    if setting.strided:
        tensors = {name: _spread(tensor) for name, tensor in tensors.items()}
    names = list(tensors)
    leaves = [tensor.detach() for tensor in tensors.values()]
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name not in setting.frozen.split())
    seed = torch.tensor(-81985529216486896, device=device)

    def fused(*leaves: Tensor) -> Tensor:
        own = dict(zip(names, leaves, strict=True))
        residual = own["x"] if setting.residual == "x" else own.get("residual")
        return bottleneck(
            own["x"], own["down"], own["up"], down_bias=own.get("down_bias"),
            up_bias=own.get("up_bias"), residual=residual, activation=setting.activation,
            scale=own.get("scale", 0.75), dropout_p=setting.dropout, seed=seed,
        )  # fmt: skip

    def stock(*leaves: Tensor) -> Tensor:
        """The module in plain torch, with the mask of the seed."""
        own = dict(zip(names, leaves, strict=True))
        x = own["x"]
        wide = x
        if not torch.is_autocast_enabled(x.device.type):
            wide = x.to(torch.promote_types(x.dtype, own["down"].dtype))
        z = linear(wide, own["down"], own.get("down_bias"))
        h = z if setting.activation == "identity" else ACTIVATIONS[setting.activation].value(z)
        u = linear(h, own["up"], own.get("up_bias"))
        if setting.dropout:
            threshold = _dropout.threshold(setting.dropout)
            rows = x.numel() // x.shape[-1]
            keep = _dropout.keep_mask(seed, threshold, rows, u.shape[-1], branch=0)
            u = u * keep.reshape(u.shape).to(u.dtype) * _dropout.keep_scale(threshold)
        y = own.get("scale", 0.75) * u
        if setting.scale:
            y = y.to(u.dtype)
        residual = x if setting.residual == "x" else own.get("residual")
        return y if residual is None else residual + y

    return Call(leaves, fused, stock, stock, setting.autocast, names)


def _spread(tensor: Tensor) -> Tensor:
    """The same values: a vector in every second element, a matrix transposed, rows apart."""
    if tensor.dim() == 1:
        return torch.stack([tensor, -tensor], 1)[:, 0]
    if tensor.dim() == 2:
        return tensor.t().contiguous().t()
    return torch.cat([tensor, -tensor], -1)[..., : tensor.shape[-1]]


_BASE = Setting()
_HALF = Setting(x=BF16, adapter=BF16)

SETTINGS: dict[str, Setting] = {
    "fp32": _BASE,
    "bf16": _HALF,
    "fp16": replace(_BASE, x=FP16, adapter=FP16),
    "fp32-adapter": replace(_BASE, x=BF16),
    "autocast": replace(_BASE, autocast=BF16),
    **{
        f"{name}": replace(_BASE, activation=name)
        for name in ("silu", "gelu", "gelu_tanh", "tanh", "leaky_relu", "identity")
    },
    "gelu-bf16": replace(_HALF, activation="gelu"),
    "dropout": replace(_BASE, dropout=0.25),
    "dropout-bf16": replace(_HALF, dropout=0.25),
    "other-residual": replace(_HALF, residual="other", outputs=40),
    "no-residual": replace(_HALF, residual="", outputs=40),
    "no-biases": replace(_HALF, bias=False),
    "scalar-scale": replace(_BASE, scale="scalar"),
    "scalar-scale-dropout": replace(_HALF, scale="scalar", dropout=0.1),
    "channel-scale": replace(_BASE, scale="channels"),
    "channel-scale-dropout": replace(_HALF, scale="channels", dropout=0.1),
    "channel-scale-autocast": replace(_BASE, scale="channels", autocast=BF16),
    "frozen-x": replace(_HALF, frozen="x"),
    "frozen-adapter": replace(_HALF, frozen="down up down_bias up_bias"),
    "only-scale": replace(_BASE, scale="channels", frozen="x down up down_bias up_bias"),
    "one-dimensional": replace(_HALF, lead=()),
    "empty": replace(_HALF, lead=(0, 3)),
    "odd-sizes": replace(_HALF, lead=(37,), features=77, outputs=77, width=5, dropout=0.1),
    "strided": replace(_BASE, strided=True, scale="channels", dropout=0.1),
    "strided-bf16": replace(_HALF, strided=True, scale="channels", activation="sigmoid"),
    "wide": replace(_BASE, lead=(5,), features=130, outputs=130, width=96),
    # Whole in fp32 on a CPU, the wider ones on tiles.
    "fp32-width-16": replace(_BASE, width=16, activation="silu"),
    "fp32-width-48": replace(
        _BASE, lead=(37,), features=77, outputs=53, width=48, residual="other", activation="gelu"
    ),
    "fp32-width-32-no-biases": replace(_BASE, width=32, bias=False, residual="", frozen="x"),
    "fp32-width-16-scale": replace(_BASE, width=16, scale="channels", strided=True),
    "fp32-width-72": replace(
        _BASE, lead=(70,), features=136, outputs=90, width=72, residual="other", activation="gelu"
    ),
    "fp32-width-96-dropout": replace(
        _BASE, lead=(2, 67), width=96, scale="channels", strided=True, dropout=0.1
    ),
    "fp32-width-130": replace(
        _BASE, lead=(530,), features=1064, outputs=77, width=130, residual="", activation="tanh"
    ),
    # What a kernel cuts into parts: rows, features of both sides, the width; and beyond its limit.
    "many-features": replace(
        _HALF, lead=(3, 27), features=1064, outputs=1064, width=20, dropout=0.1
    ),
    "many-rows": replace(_HALF, lead=(530,), width=24, activation="silu", scale="channels"),
    "width-96-bf16": replace(_HALF, features=136, outputs=136, width=96, activation="gelu"),
    "width-128-bf16": replace(_HALF, lead=(70,), features=136, outputs=136, width=128, dropout=0.1),
    "width-96-autocast": replace(_BASE, autocast=BF16, lead=(70,), width=96, dropout=0.1),
    "width-130-bf16": replace(_HALF, lead=(5,), width=130),
    "autocast-fp16": replace(_BASE, autocast=FP16, dropout=0.25, activation="leaky_relu"),
    "autocast-dropout": replace(_BASE, x=BF16, autocast=BF16, dropout=0.25, activation="tanh"),
    "identity-bf16": replace(_HALF, activation="identity", dropout=0.1),
    "only-up": replace(_HALF, activation="silu", frozen="x down down_bias", dropout=0.1),
    "only-down": replace(_HALF, activation="silu", frozen="x up up_bias"),
    "only-biases": replace(_HALF, activation="silu", frozen="x down up"),
    "only-scale-bf16": replace(_HALF, scale="scalar", frozen="x down up down_bias up_bias"),
}

CASES = [
    Case(f"bottleneck-{name}", "bottleneck", partial(_build, setting), WITH_CUDA)
    for name, setting in SETTINGS.items()
]
_EXACT = replace(_BASE, x=FP64, adapter=FP64, lead=(3,), features=9, outputs=9, width=4)
CASES += [
    Case(f"bottleneck-{name}", "bottleneck", partial(_build, setting), backends=("reference",))
    for name, setting in (
        ("fp64", replace(_EXACT, activation="gelu")),
        ("scales-fp64", replace(_EXACT, activation="tanh", scale="channels", dropout=0.2)),
    )
]

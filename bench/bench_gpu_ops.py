"""Every op at Llama-3-8B sizes on a GPU, forward and backward, against torch, Liger where it is
installed, and a floor: the copies or matrix products that must run, timed in the same rounds.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agreement, dropout_off, trainable
from families import LLAMA3
from gpu_time import Step, time_variants
from torch import Tensor, nn

import fasttune
from fasttune import _native, ops
from fasttune._registry import use_backend
from fasttune.nn import BottleneckAdapter
from fasttune.ops import policy
from fasttune.optim import AdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BF16 = torch.bfloat16
M, H, I = 8192, LLAMA3.hidden, LLAMA3.intermediate  # noqa: E741 (the field's letters)
EPS = 1e-5
CUDA_TIER = _native.cuda_missing() is None
LIGER = importlib.util.find_spec("liger_kernel") is not None


def randn(*shape: int, grad: bool = True, scale: float = 1.0, dtype: Any = BF16) -> Tensor:
    value = torch.randn(shape, device="cuda", dtype=torch.float32) * scale
    return value.to(dtype).requires_grad_(grad)


def both_ways(function: Callable[..., Any], leaves: list[Tensor], dys: list[Tensor]) -> Step:
    """Forward and backward, gradients of all leaves."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, dys)

    return step


def with_cuda_tier(variants: dict[str, Step]) -> dict[str, Step]:
    """And our kernels of CUDA C++, where they are built: the others are Triton's."""
    ours = variants["fasttune"]

    def step() -> None:
        with use_backend("cuda"):
            ours()

    return variants | ({"fasttune cuda": step} if CUDA_TIER else {})


def results(function: Callable[..., Any], leaves: list[Tensor], dys: list[Tensor]) -> dict:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, leaves, dys)
    names = [*(f"y{i}" for i in range(len(outputs))), *(f"d{i}" for i in range(len(leaves)))]
    return dict(zip(names, (t.detach() for t in (*outputs, *gradients)), strict=True))


def copies(number_of_bytes: int) -> Step:
    """Moves that many bytes, half of them read."""
    source = torch.empty(number_of_bytes // 2, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


@pytest.fixture
def measure(record) -> Callable[..., None]:
    """``measure(variants, floor=, **facts)``: times, and one result against each other variant."""

    def run(variants: dict[str, Step], **facts: Any) -> None:
        times = time_variants(variants)
        ours = times["fasttune"]
        for name, other in times.items():
            if name == "fasttune":
                continue
            record(
                kind="gpu", unit="ms", runs=9, baseline=name, stock=other.ms, fasttune=ours.ms,
                ratio=other.ms / ours.ms, busy=[other.busy_ms, ours.busy_ms],
                busy_ratio=other.busy_ms / ours.busy_ms, launches=[other.launches, ours.launches],
                peak_mib=[other.peak_bytes / 2**20, ours.peak_bytes / 2**20],
                spread=[other.spread, ours.spread], dtype="bf16", **facts,
            )  # fmt: skip

    return run


def against_torch(
    stock: Callable[..., Any], ours: Callable[..., Any], leaves: list[Tensor], dys: list[Tensor]
) -> dict[str, Step]:
    """Both, once ours agrees with the truth as well as torch does."""
    wide = [leaf.detach().float() for leaf in leaves]
    truth = results(stock, wide, [dy.float() for dy in dys])
    assert_agreement(results(stock, leaves, dys), results(ours, leaves, dys), truth, dtype=BF16)
    return {"torch": both_ways(stock, leaves, dys), "fasttune": both_ways(ours, leaves, dys)}


def test_rms_norm(measure) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    weight = randn(H, grad=False)
    stock = LlamaRMSNorm(H, EPS).to("cuda", BF16).requires_grad_(False)
    stock.weight.copy_(weight)
    x, dy = randn(M, H), randn(M, H, grad=False)

    def formula(x: Tensor) -> Tensor:
        scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
        return weight.to(x.dtype) * scaled.to(x.dtype)

    def ours(x: Tensor) -> Tensor:
        return ops.rms_norm(x, weight, eps=EPS, round_first=True)

    variants = against_torch(formula, ours, [x], [dy])
    variants["torch"] = both_ways(stock, [x], [dy])
    if LIGER:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Liger

        variants["liger"] = both_ways(
            lambda x: Liger.apply(x, weight, EPS, 0.0, "llama", False), [x], [dy]
        )
    variants["floor"] = copies(5 * M * H * 2)
    measure(with_cuda_tier(variants), shape=[M, H])


def test_layer_norm(measure) -> None:
    weight, bias = randn(H, grad=False), randn(H, grad=False)
    x, dy = randn(M, H), randn(M, H, grad=False)
    variants = against_torch(
        lambda x: F.layer_norm(x, (H,), weight.to(x.dtype), bias.to(x.dtype), EPS),
        lambda x: ops.layer_norm(x, weight, bias, eps=EPS),
        [x], [dy],
    )  # fmt: skip
    variants["floor"] = copies(5 * M * H * 2)
    measure(variants, shape=[M, H])


def test_glu(measure) -> None:
    gate, up, dy = randn(M, I), randn(M, I), randn(M, I, grad=False)
    variants = against_torch(
        lambda g, u: F.silu(g) * u, lambda g, u: ops.glu(g, u, activation="silu"), [gate, up], [dy]
    )
    if LIGER:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction as Liger

        # Its backward overwrites what the forward saved, so it gets leaves of its own.
        own = [gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()]
        variants["liger"] = both_ways(Liger.apply, own, [dy])
    variants["floor"] = copies(8 * M * I * 2)
    measure(with_cuda_tier(variants), shape=[M, I])


def test_rope(measure) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, kv_heads, width, length = 32, 8, 128, M // 4
    q = randn(4, length, heads, width).detach().transpose(1, 2).requires_grad_()
    k = randn(4, length, kv_heads, width).detach().transpose(1, 2).requires_grad_()
    dys = [randn(4, n, length, width, grad=False) for n in (heads, kv_heads)]
    angles = torch.rand(1, length, width // 2, device="cuda") * 6.28
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos().to(BF16), angles.sin().to(BF16)
    variants = against_torch(
        lambda q, k: apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype)),
        lambda q, k: ops.rope(q, k, cos, sin),
        [q, k], dys,
    )  # fmt: skip
    if LIGER:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        variants["liger"] = both_ways(
            lambda q, k: liger_rotary_pos_emb(q, k, cos, sin), [q, k], dys
        )
    variants["floor"] = copies(4 * M * (heads + kv_heads) * width * 2)
    measure(variants, shape=[4, heads, length, width])


def test_linear_cross_entropy(measure) -> None:
    rows, vocabulary = M, LLAMA3.vocabulary
    hidden = randn(rows, H)
    weight = randn(vocabulary, H, grad=False, scale=0.02)
    targets = torch.randint(vocabulary, (rows,), device="cuda")
    one = torch.ones((), device="cuda")

    def stock(x: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets)

    def few(function: Callable[..., Any], x: Tensor, head: Tensor) -> dict[str, Tensor]:
        return results(lambda x: function(x, head), [x[:512]], [one])

    def plain(x: Tensor, head: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, head).float(), targets[:512])

    def fused(x: Tensor, head: Tensor) -> Tensor:
        return ops.linear_cross_entropy(x, head, targets[:512])

    truth = few(plain, hidden.detach().float(), weight.float())
    assert_agreement(few(plain, hidden, weight), few(fused, hidden, weight), truth, dtype=BF16)
    variants: dict[str, Step] = {
        "torch": both_ways(stock, [hidden], [one]),
        "fasttune": both_ways(
            lambda x: ops.linear_cross_entropy(x, weight, targets), [hidden], [one]
        ),
    }
    if LIGER:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        variants["liger"] = both_ways(lambda x: loss(weight, x, targets), [hidden], [one])
    logits = torch.empty(rows, vocabulary, dtype=BF16, device="cuda").normal_()
    plain_x = hidden.detach()

    def floor() -> None:
        torch.mm(plain_x, weight.t(), out=logits)
        torch.mm(logits, weight)

    variants["floor"] = floor
    measure(variants, shape=[rows, H, vocabulary])


def lora_layers(
    outputs: list[int], dropout: float, features: int, adapter_dtype: torch.dtype, **options: Any
) -> nn.Module:
    """Linear layers of one input with PEFT LoRA r 16."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Linear(features, n, bias=False, dtype=BF16, device="cuda") for n in outputs
            )

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(layer(x) for layer in self.layers)

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=dropout, init_lora_weights=False,
        target_modules=[f"layers.{i}" for i in range(len(outputs))], **options,
    )  # fmt: skip
    model = peft.get_peft_model(Layers(), config).train()
    for parameter in trainable(model).values():
        parameter.data = parameter.data.to(adapter_dtype)
    return model


@dataclass(frozen=True)
class LoraCase:
    """Layers of one input; fp32 adapters are what PEFT makes, and the CUDA tier takes bf16 ones."""

    outputs: list[int]
    dropout: float = 0.0
    rows: int = M
    features: int = H
    adapter_dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)


LORA_CASES = {
    "q-dropout": LoraCase([H], 0.05),
    "q": LoraCase([H]),
    "q-dropout-bf16-adapters": LoraCase([H], 0.05, adapter_dtype=BF16),
    "q-bf16-adapters": LoraCase([H], adapter_dtype=BF16),
    "qkv-dropout": LoraCase([H, LLAMA3.kv, LLAMA3.kv], 0.05),
    "gate-up-dropout": LoraCase([I, I], 0.05),
    "q-dora": LoraCase([H], options={"use_dora": True}),
    # The host's time: what these do is over before Python is.
    "small-dropout": LoraCase([1024], 0.05, rows=256, features=1024),
    "small": LoraCase([1024], rows=256, features=1024),
    "small-dropout-bf16-adapters": LoraCase(
        [1024], 0.05, rows=256, features=1024, adapter_dtype=BF16
    ),
}


@pytest.mark.parametrize("name", LORA_CASES)
def test_lora(measure, name: str) -> None:
    case = LORA_CASES[name]
    outputs, rows, features = case.outputs, case.rows, case.features
    stock = lora_layers(outputs, case.dropout, features, case.adapter_dtype, **case.options)
    patched = fasttune.patch(copy.deepcopy(stock), strict=True)
    x, dys = randn(rows, features), [randn(rows, n, grad=False) for n in outputs]

    def outcome(model: nn.Module, x: Tensor, dys: list[Tensor]) -> dict[str, Tensor]:
        x = x.detach().clone().requires_grad_()
        with dropout_off(model):
            model(x)  # layers find their groups
            ys = model(x)
            torch.autograd.backward(ys, dys)
        found = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {"dx": x.grad}
        for name, parameter in trainable(model).items():
            found[name], parameter.grad = parameter.grad, None
        return found

    wide = copy.deepcopy(stock).float()
    truth = outcome(wide, x.float(), [dy.float() for dy in dys])
    assert_agreement(outcome(stock, x, dys), outcome(patched, x, dys), truth, dtype=BF16)
    del wide, truth

    def step_of(model: nn.Module) -> Step:
        inner = both_ways(model, [x], dys)
        parameters = list(trainable(model).values())

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            inner()

        return step

    weights = [layer.get_base_layer().weight for layer in stock.base_model.model.layers]
    plain_x = x.detach()

    def floor() -> None:
        for weight, dy in zip(weights, dys, strict=True):
            torch.mm(plain_x, weight.t())
            torch.mm(dy, weight)

    variants = {"torch": step_of(stock), "fasttune": step_of(patched), "floor": floor}
    if case.adapter_dtype == BF16:
        variants = with_cuda_tier(variants)
    measure(
        variants, shape=[rows, features, outputs], rank=16, dropout=case.dropout,
        adapter_dtype=str(case.adapter_dtype).removeprefix("torch."),
    )  # fmt: skip


@pytest.mark.parametrize("order", ["blocks", "alternating"])
def test_lora_segmented(measure, order: str) -> None:
    """Eight adapters in one batch of 16 samples, r 16 in fp32, against their loop and the base."""
    adapters, samples = 8, 16
    weight = randn(H, H, grad=False, scale=H**-0.5)
    rows_of = [
        i * adapters // samples if order == "blocks" else i % adapters for i in range(samples)
    ]
    x, dy = randn(samples, M // samples, H), randn(samples, M // samples, H, grad=False)
    factors = [
        randn(*shape, scale=shape[1] ** -0.5, dtype=torch.float32)
        for _ in range(adapters)
        for shape in ((16, H), (H, 16))
    ]

    def ours(x: Tensor, *factors: Tensor) -> Tensor:
        pairs = zip(factors[::2], factors[1::2], strict=True)
        branches = [ops.LoraBranch(a, b, 2.0) for a, b in pairs]
        return ops.lora_segmented(x, weight.to(x.dtype), branches, rows_of)

    def loop(x: Tensor, *factors: Tensor) -> Tensor:
        y = F.linear(x, weight.to(x.dtype))
        for j, (a, b) in enumerate(zip(factors[::2], factors[1::2], strict=True)):
            places = [i for i, owner in enumerate(rows_of) if owner == j]
            own = x[places].to(a.dtype)
            y[places] += (F.linear(F.linear(own, a), b) * 2.0).to(y.dtype)
        return y

    leaves = [x, *factors]
    truth = results(loop, [leaf.detach().float() for leaf in leaves], [dy.float()])
    assert_agreement(results(loop, leaves, [dy]), results(ours, leaves, [dy]), truth, dtype=BF16)
    plain_x, plain_dy = x.detach().flatten(0, 1), dy.flatten(0, 1)

    def floor() -> None:
        torch.mm(plain_x, weight.t())
        torch.mm(plain_dy, weight)

    measure(
        {"torch": both_ways(loop, leaves, [dy]), "fasttune": both_ways(ours, leaves, [dy]),
         "floor": floor},
        shape=[M, H, H], rank=16, adapters=adapters, order=order,
    )  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("size", [16, 64, 128, 256])
@pytest.mark.parametrize("rows", [256, 2048, M])
@pytest.mark.parametrize("adapter", ["bf16", "autocast"])
def test_bottleneck(measure, adapter: str, rows: int, size: int, dropout: float) -> None:
    """The module against torch's operations, which it runs itself where policy.py says so."""
    torch.manual_seed(0)
    kind = BF16 if adapter == "bf16" else torch.float32
    ours = BottleneckAdapter(H, size, "relu", dtype=kind, dropout=dropout).cuda()
    nn.init.normal_(ours.up.weight, std=size**-0.5)
    stock = copy.deepcopy(ours)

    def eager(x: Tensor) -> Tensor:
        return x + F.dropout(stock.up(stock.down(x).relu()), dropout)

    def called(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *_: Tensor) -> Tensor:
            with torch.autocast("cuda", BF16, enabled=adapter == "autocast"):
                return function(x)

        return call

    x, dy = randn(rows, H), randn(rows, H, grad=False)
    if dropout == 0.0:
        exact = copy.deepcopy(ours).float()
        truth = results(lambda x: x + exact.up(exact.down(x).relu()), [x.float()], [dy.float()])
        found = (results(called(f), [x], [dy]) for f in (eager, ours))
        assert_agreement(*found, truth, dtype=BF16)
    steps = {
        name: both_ways(called(function), [x, *module.parameters()], [dy])
        for name, function, module in (("torch", eager, stock), ("fasttune", ours, ours))
    }
    if adapter == "bf16":  # its CUDA C++ is the elementwise parts, in one dtype
        steps = with_cuda_tier(steps)
    # x, y, dy, dx once, and dy again: dx needs the whole row.
    with policy.no_limits():
        measure(
            steps | {"floor": copies(5 * rows * H * 2)},
            shape=[rows, H, size], dropout=dropout, adapter=adapter,
        )  # fmt: skip


ADAMW_SHAPES = {
    "lora-8B-r16": [
        shape
        for _ in range(32)
        for n, k in ((H, H), (LLAMA3.kv, H), (LLAMA3.kv, H), (H, H), (I, H), (I, H), (H, I))
        for shape in ((16, k), (n, 16))
    ],
    "full-0.5B": [(8192, 8192)] * 8,
}


@pytest.mark.parametrize("size", ADAMW_SHAPES)
def test_adamw(measure, size: str) -> None:
    """fp32, clipped to a norm of 1: against clip_grad_norm_ and torch's fused AdamW."""
    shapes = ADAMW_SHAPES[size]

    def parameters() -> list[nn.Parameter]:
        torch.manual_seed(0)
        made = [nn.Parameter(torch.randn(shape, device="cuda") * 0.02) for shape in shapes]
        for param in made:
            param.grad = torch.randn_like(param) * 1e-3
        return made

    theirs, mine = parameters(), parameters()
    stock = torch.optim.AdamW(theirs, lr=1e-4, fused=True)

    def stock_step() -> None:
        nn.utils.clip_grad_norm_(theirs, 1.0)
        stock.step()

    step = AdamW(mine, lr=1e-4, max_grad_norm=1.0).step
    stock_step()
    step()
    for own, other in zip(mine, theirs, strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-7)
    elements = sum(param.numel() for param in mine)
    variants = {"torch": stock_step, "fasttune": step, "floor": copies(32 * elements)}
    measure(
        with_cuda_tier(variants),
        shape=[elements], tensors=len(shapes),
    )  # fmt: skip

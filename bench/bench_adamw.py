"""A clipped step of fasttune.optim.AdamW against clip_grad_norm_ and torch's fused AdamW."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fasttune.optim import AdamW

MAX_NORM = 1.0
# The LoRA of SmolLM2-135M: r 16 on seven linear layers of 30 blocks; and a model of 135M.
SHAPES = {
    "lora-420x9216": [(16, 576)] * 420,
    "full-135M": [(49152, 576), *([(576, 576), (1536, 576), (1536, 576), (576, 1536)] * 33)],
    "one-small": [(16, 576)] * 8,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parameters(shapes: list[tuple[int, int]], dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        param = nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device, dtype))
        param.grad = (torch.randn(shape, generator=generator) * 1e-3).to(device, dtype)
        made.append(param)
    return made


def fasttune_step(params: list[Tensor], **options: str) -> Callable[[], None]:
    return AdamW(params, max_grad_norm=MAX_NORM, **options).step


def torch_step(params: list[Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(params, fused=True)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


def results(shapes: list[tuple[int, int]], dtype: torch.dtype) -> tuple[dict, dict, dict]:
    """Two steps on the first tensors: torch's, ours and torch's in fp64."""
    found: list[dict[str, Tensor]] = []
    for kind in ("torch", "fasttune", "truth"):
        params = parameters(shapes[-8:], dtype, "cpu")
        if kind == "truth":
            wide = [nn.Parameter(param.detach().double()) for param in params]
            for param, own in zip(params, wide, strict=True):
                own.grad = param.grad.double()
            params = wide
        step = fasttune_step(params) if kind == "fasttune" else torch_step(params)
        for _ in range(2):
            step()
        found.append({str(i): param.detach() for i, param in enumerate(params)})
    return found[0], found[1], found[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SHAPES)
def test_adamw_time(paired, device: str, size: str, dtype: str) -> None:
    shapes = SHAPES[size]
    stock, ours = (parameters(shapes, DTYPES[dtype], device) for _ in range(2))
    paired(
        torch_step(stock), fasttune_step(ours), check=lambda: results(shapes, DTYPES[dtype]),
        dtype=DTYPES[dtype], model="adamw", shape=size, base_dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("size", ["lora-420x9216", "full-135M"])
def test_adamw_bandwidth(paired, record, device: str, size: str) -> None:
    """Without a limit: 28 bytes an fp32 element on both sides, ratio of the bandwidths."""
    shapes = SHAPES[size]
    stock, ours = (parameters(shapes, torch.float32, device) for _ in range(2))
    paired(
        torch.optim.AdamW(stock, fused=True).step, AdamW(ours).step,
        check=lambda: results(shapes, torch.float32), dtype=torch.float32, model="adamw",
        shape=size, base_dtype="fp32",
    )  # fmt: skip


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_adamw_state_bytes(record, device: str, moments: str) -> None:
    """Bytes of the moments of 2.4M parameters, against fp32."""
    shapes = [(1536, 576), (576, 1536), (1536, 576)]
    sizes = {}
    for kind in ("fp32", moments):
        params = parameters(shapes, torch.float32, device)
        optimizer = AdamW(params, moments=kind)
        optimizer.step()
        state = [own for param in params for own in optimizer.state[param].items()]
        sizes[kind] = sum(t.numel() * t.element_size() for name, t in state if name != "step")
    record(
        kind="memory", unit="MiB", runs=1, stock=sizes["fp32"] / 2**20,
        fasttune=sizes[moments] / 2**20, ratio=sizes[moments] / sizes["fp32"],
        model="adamw", moments=moments,
    )  # fmt: skip
    assert sizes[moments] / sizes["fp32"] <= {"fp32": 1.0, "bf16": 0.5, "8bit": 0.3}[moments]

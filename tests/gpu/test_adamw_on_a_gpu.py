"""The optimizer on a GPU: the results of the CPU, two kernels a step, no wait, CUDA graphs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttune.optim import AdamW

pytestmark = pytest.mark.gpu

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(40, 130), (7,), (4096, 3), (1000, 37)]


def parameters(dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=generator) for shape in SHAPES)
    return [nn.Parameter((0.05 * value).to(device, dtype)) for value in drawn]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        drawn = torch.randn(param.shape, generator=generator)
        param.grad = drawn.to(param.device, param.dtype)


def train(device: str, dtype: torch.dtype, steps: int = 4, **options: Any) -> tuple[Any, AdamW]:
    params = parameters(dtype, device)
    optimizer = AdamW(params, lr=1e-2, **options)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("rounding", ["master", "stochastic", "kahan", "nearest"])
def test_steps_are_those_of_the_cpu(dtype: torch.dtype, moments: str, rounding: str) -> None:
    options: dict[str, Any] = {"moments": moments, "rounding": rounding, "max_grad_norm": 1.0}
    here, mine = train("cuda", dtype, **options)
    there, theirs = train("cpu", dtype, **options)
    for own, other in zip(here, there, strict=True):
        mine_p, their_p = (param.detach().cpu().double() for param in (own, other))
        moved, unit = (mine_p - their_p).abs(), torch.finfo(dtype).eps * their_p.abs()
        # A last digit of a moment may flip the rounding of an element, or its 8-bit code, at each
        # of the four steps, which moves it by a part of the learning rate.
        allowed = 4 * unit + (1e-6 if moments == "fp32" else 0.02 * 4 * 1e-2)
        assert bool((moved <= allowed).all()), float((moved - allowed).max())
        if dtype != FP32:
            assert float((moved > unit / 4).double().mean()) < 0.02
    assert float(mine.grad_norm) == pytest.approx(float(theirs.grad_norm), rel=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}])
def test_steps_are_those_of_torch(options: dict[str, bool]) -> None:
    ours, _ = train("cuda", FP32, **options)
    theirs = [nn.Parameter(param.detach().double()) for param in parameters(FP32, "cuda")]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, **options)
    for step in range(4):
        set_gradients(theirs, step)
        for param in theirs:
            param.grad = param.grad.float().double()  # type: ignore[union-attr]
        optimizer.step()
    for own, other in zip(ours, theirs, strict=True):
        assert torch.allclose(own.double(), other, rtol=1e-6, atol=2e-7)


def test_a_step_is_two_kernels_and_a_copy_whatever_the_number_of_tensors() -> None:
    from torch.profiler import ProfilerActivity, profile

    params, optimizer = train("cuda", BF16, max_grad_norm=1.0)
    set_gradients(params, 9)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [e.name for e in recorded.events() if e.device_type.name == "CUDA"]
    copies = [name for name in kernels if "memcpy" in name.lower()]
    assert len(kernels) - len(copies) == 2, kernels
    assert len(copies) == 1, copies


def test_a_step_does_not_wait() -> None:
    params, optimizer = train("cuda", FP32, max_grad_norm=1.0)
    set_gradients(params, 9)
    before = [param.detach().clone() for param in params]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):  # a wait would be seen
            params[0].sum().item()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(map(torch.equal, before, params))


def test_a_captured_step_replays() -> None:
    options: dict[str, Any] = {"capturable": True, "max_grad_norm": 1.0}
    params, optimizer = train("cuda", FP32, steps=3, **options)
    set_gradients(params, 3)
    grads: list[Tensor] = [param.grad for param in params]  # type: ignore[misc]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in (3, 4, 5):
        set_gradients(params, step)
        for own, param in zip(grads, params, strict=True):
            own.copy_(param.grad)  # type: ignore[arg-type]
        graph.replay()
    straight, other = train("cuda", FP32, steps=6, **options)
    for own, param in zip(params, straight, strict=True):
        assert torch.equal(own, param)
    steps = [float(o.state[p[0]]["step"]) for o, p in ((optimizer, params), (other, straight))]
    assert steps == [6, 6]


def test_a_grad_scaler_unscales_and_skips() -> None:
    params = parameters(FP32, "cuda")
    optimizer = AdamW(params, lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for step in itertools.chain(range(2), (99,), range(2, 4)):
        set_gradients(params, step)
        scale = scaler.get_scale()
        for param in params:
            param.grad *= scale  # type: ignore[operator]
        if step == 99:
            params[0].grad[0, 0] = float("inf")  # type: ignore[index]
        scaler.scale(torch.zeros((), device="cuda"))
        scaler.step(optimizer)
        scaler.update()
    straight, _ = train("cuda", FP32)
    for own, other in zip(params, straight, strict=True):
        assert torch.allclose(own, other, rtol=1e-6, atol=1e-7)

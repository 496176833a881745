"""The optimizer's step inside the backward pass."""

from __future__ import annotations

import pytest
import torch
from tiny_models import loss_of, tiny_llama
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fasttune.optim import AdamW, fuse_into_backward


def test_steps_inside_the_backward_are_the_ordinary_ones() -> None:
    usual, fused = tiny_llama(), tiny_llama()
    one, two = AdamW(usual.parameters(), lr=1e-2), AdamW(fused.parameters(), lr=1e-2)
    handle = fuse_into_backward(fused, two)
    two.name_parameters(fused.named_parameters())
    one.name_parameters(usual.named_parameters())
    for step in range(3):
        loss_of(usual, step).backward()
        one.step()
        one.zero_grad()
        loss_of(fused, step).backward()
        assert all(param.grad is None for param in fused.parameters())
        two.step()
    for p, q in zip(usual.parameters(), fused.parameters(), strict=True):
        assert torch.equal(p, q)
    assert two.monitor() == one.monitor() and len(one.monitor()) > 10
    handle.remove()
    loss_of(fused, 3).backward()
    assert all(param.grad is not None for param in fused.parameters())
    two.step()
    loss_of(usual, 3).backward()
    one.step()
    assert all(
        torch.equal(p, q) for p, q in zip(usual.parameters(), fused.parameters(), strict=True)
    )


def test_random_bits_and_groups_are_those_of_an_ordinary_step() -> None:
    usual, fused = tiny_llama().bfloat16(), tiny_llama().bfloat16()

    def optimizer(model: nn.Module) -> AdamW:
        params = list(model.parameters())
        groups = [{"params": params[:3], "lr": 1e-3}, {"params": params[3:], "lr": 1e-1}]
        return AdamW(groups, rounding="stochastic", seed=7)

    one, two = optimizer(usual), optimizer(fused)
    fuse_into_backward(fused, two)
    for step in range(2):
        loss_of(usual, step).backward()
        one.step()
        one.zero_grad()
        loss_of(fused, step).backward()
        two.step()
    for p, q in zip(usual.parameters(), fused.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_monitor_shows_the_last_backward_only() -> None:
    model = tiny_llama()
    optimizer = AdamW(model.parameters())
    fuse_into_backward(model, optimizer)
    optimizer.name_parameters(model.named_parameters())
    loss_of(model, 0).backward()
    optimizer.step()
    model.get_input_embeddings().requires_grad_(False)
    loss_of(model, 1).backward()
    names = {name for name, param in model.named_parameters() if param.requires_grad}
    assert set(optimizer.monitor()) == names


def test_gradient_accumulation_is_refused() -> None:
    model = tiny_llama()
    optimizer = AdamW(model.parameters())
    fuse_into_backward(model, optimizer)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"second gradient before optimizer.step"):
        loss_of(model, 1).backward()
    optimizer.step()
    optimizer.grad_scale = torch.ones(())  # what a GradScaler sets
    with pytest.raises(RuntimeError, match="GradScaler has to see all gradients"):
        optimizer.zero_grad()
        loss_of(model, 1).backward()


def test_what_cannot_be_fused_into_a_backward_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(TypeError, match=r"optimizer: expected fasttune.optim.AdamW, got SGD"):
        fuse_into_backward(model, torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_grad_norm: expected None: a global norm needs"):
        fuse_into_backward(model, AdamW(model.parameters(), max_grad_norm=1.0))
    with pytest.raises(ValueError, match="skip_nonfinite: expected False: a global norm needs"):
        fuse_into_backward(model, AdamW(model.parameters(), skip_nonfinite=True))
    averaged = object.__new__(DistributedDataParallel)  # its own __init__ wants a process group
    with pytest.raises(ValueError, match="model: DistributedDataParallel averages gradients"):
        fuse_into_backward(averaged, AdamW(model.parameters()))
    with pytest.raises(ValueError, match="optimizer: has parameters that model does not own"):
        fuse_into_backward(nn.Linear(2, 2), AdamW(model.parameters()))
    optimizer = AdamW(model.parameters())
    fuse_into_backward(model, optimizer)
    with pytest.raises(ValueError, match="was called for it already"):
        fuse_into_backward(model, optimizer)

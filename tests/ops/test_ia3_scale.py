"""What is special of ia3_scale; tests/test_conformance.py has the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fasttune.ops import LoraProjection, glu, ia3_scale
from fasttune.ops.lora_linear import apply_group
from fasttune.testing import accounting
from fasttune.testing.conformance import backend

BF16, FP32 = torch.bfloat16, torch.float32
ROWS, WIDTH = 8192, 14336


def normal(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def kept(y: Tensor) -> list[Tensor]:
    """The tensors that the node of y saved."""
    saved = y.grad_fn.saved_tensors  # type: ignore[union-attr]
    return [tensor for tensor in saved if tensor is not None]


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_the_sum_over_rows_has_one_order(name: str) -> None:
    x, scale = normal(1500, 40, dtype=BF16), normal(40)
    dy, gradients = torch.randn(1500, 40).to(BF16), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            with backend(name):
                gradients.append(torch.autograd.grad(ia3_scale(x, scale), scale, dy)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])


def test_a_frozen_scale_keeps_nothing_and_sums_nothing() -> None:
    x = torch.empty(ROWS, WIDTH, dtype=BF16, device="meta", requires_grad=True)
    scale = torch.empty(WIDTH, device="meta")
    counts = accounting.count(ia3_scale, x, scale)
    assert [tensor.shape for tensor in kept(ia3_scale(x, scale))] == [(WIDTH,)]
    names = [launch.name for launch in counts.total.launches]
    assert names == ["fasttune::scaled_sum", "fasttune::scaled_sum"]


def test_a_trained_scale_moves_five_times_its_input() -> None:
    """x to y, then dy and x to dx; saved is x itself, where PEFT's formula keeps an fp32 copy."""
    x = torch.empty(ROWS, WIDTH, dtype=BF16, device="meta", requires_grad=True)
    scale = torch.empty(WIDTH, device="meta", requires_grad=True)
    ours = accounting.count(ia3_scale, x, scale)
    stock = accounting.count(lambda x, s: (x.to(FP32) * s).to(x.dtype), x, scale)
    assert ours.total.opaque.calls == 0
    assert ours.saved_bytes == 0
    assert 5 * x.nbytes < ours.total.bytes_moved < 5.1 * x.nbytes
    assert stock.saved_bytes >= 2 * x.nbytes and stock.total.bytes_moved > 14 * x.nbytes


def chain(gate: Tensor, up: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The end of a gated MLP: (the scaled hidden state, the product of a trained weight)."""
    scaled = ia3_scale(glu(gate, up, activation="silu"), scale)
    (y,) = apply_group(scaled, (LoraProjection(weight, None, ()),), scaled.dtype)
    return scaled, y


def chain_of_torch(gate: Tensor, up: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    hidden = torch.nn.functional.silu(gate) * up
    return torch.nn.functional.linear(hidden * scale, weight)


def leaves() -> list[Tensor]:
    return [normal(17, 24), normal(17, 24).detach().flip(0).requires_grad_(), normal(24),
            normal(12, 24)]  # fmt: skip


def test_neither_input_nor_output_is_kept_behind_a_producer() -> None:
    given = leaves()
    scaled, y = chain(*given)
    assert [tensor.shape for tensor in kept(scaled)] == [(24,)]
    assert [tuple(tensor.shape) for tensor in kept(y)] == [(12, 24)]
    ours = torch.autograd.grad(y.square().sum(), given)
    theirs = torch.autograd.grad(chain_of_torch(*given).square().sum(), given)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_x_is_kept_once_for_the_scale_and_a_trained_weight() -> None:
    x, scale, weight = normal(17, 24), normal(24), normal(12, 24)
    scaled = ia3_scale(x, scale)
    (y,) = apply_group(scaled, (LoraProjection(weight, None, ()),), FP32)
    assert [tuple(tensor.shape) for tensor in kept(scaled)] == [(17, 24), (24,)]
    assert [tuple(tensor.shape) for tensor in kept(y)] == [(12, 24)]
    ours = torch.autograd.grad(y.sum(), [x, scale, weight])
    theirs = torch.autograd.grad(((x * scale) @ weight.t()).sum(), [x, scale, weight])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool) -> None:
    given = leaves()
    y = checkpoint(lambda *ts: chain(*ts)[1], *given, use_reentrant=reentrant)
    y.square().sum().backward()
    expected = torch.autograd.grad(chain(*given)[1].square().sum(), given)
    for leaf, gradient in zip(given, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)  # type: ignore[arg-type]


def test_a_scale_changed_before_backward_raises() -> None:
    given = leaves()
    y = chain(*given)[1]
    with torch.no_grad():
        given[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_vmap_outputs_in_place_and_second_derivatives() -> None:
    x, scale = normal(3, 5, 24), normal(24)
    mapped = torch.func.vmap(lambda row: ia3_scale(row, scale))(x)
    assert torch.equal(mapped, ia3_scale(x, scale))
    y = ia3_scale(x, scale)
    y *= 2
    assert torch.equal(y, 2 * (x * scale))
    (gradient,) = torch.autograd.grad(ia3_scale(x, scale).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("x", "scale", "error", "message"),
    [
        (3, normal(4), TypeError, "x: expected a tensor, got int"),
        (torch.ones(4, dtype=torch.int64), normal(4), TypeError, "x: expected fp32"),
        (torch.tensor(1.0), normal(4), ValueError, "x: expected at least one dimension"),
        (normal(2, 4), normal(5), ValueError, r"scale: expected shape \[4\], got \[5\]"),
        (normal(2, 4), normal(1, 4), ValueError, r"scale: expected shape \[4\], got \[1, 4\]"),
        (normal(2, 4), 2.0, TypeError, "scale: expected a tensor, got float"),
    ],
)
def test_wrong_arguments_are_named(
    x: Any, scale: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ia3_scale(x, scale)

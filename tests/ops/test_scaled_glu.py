"""What is special of scaled_glu; tests/test_conformance.py has the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fasttune.ops import glu, ia3_scale, scaled_glu
from fasttune.testing import accounting
from fasttune.testing.conformance import backend

BF16, FP32 = torch.bfloat16, torch.float32
ROWS, WIDTH = 8192, 14336


def normal(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_the_sum_over_rows_has_one_order(name: str) -> None:
    gate, up, scale = normal(700, 40, dtype=BF16), normal(700, 40, dtype=BF16), normal(40)
    dy, gradients = torch.randn(700, 40).to(BF16), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            with backend(name):
                y = scaled_glu(gate, up, scale, activation="silu")
                gradients.append(torch.autograd.grad(y, scale, dy)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])


def test_it_is_glu_and_ia3_scale_in_half_the_traffic() -> None:
    gate, up = (torch.empty(ROWS, WIDTH, dtype=BF16, device="meta") for _ in range(2))
    scale = torch.empty(WIDTH, device="meta")
    for leaf in (gate, up, scale):
        leaf.requires_grad_()

    def apart(gate: Tensor, up: Tensor, scale: Tensor) -> Tensor:
        return ia3_scale(glu(gate, up, activation="silu"), scale)

    def together(gate: Tensor, up: Tensor, scale: Tensor) -> Tensor:
        return scaled_glu(gate, up, scale, activation="silu")

    counts = [accounting.count(each, gate, up, scale) for each in (apart, together)]
    before, after = (each.total.bytes_moved / (ROWS * WIDTH * 2) for each in counts)
    assert 16 <= before < 17  # hidden states: 5 forward, 3 for h again, 3 and 5 backward
    assert 8 <= after < 8.5  # gate, up to y; dy, gate, up to both gradients
    assert counts[1].saved_bytes <= counts[0].saved_bytes


def test_an_output_is_rebuilt_bit_for_bit_for_its_consumer() -> None:
    gate, up, scale, second = normal(9, 24), normal(9, 24), normal(24), normal(24)
    y = ia3_scale(scaled_glu(gate, up, scale, activation="gelu"), second)
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert [t.shape for t in saved] == [(24,)]
    dy = torch.randn(9, 24)
    (ours,) = torch.autograd.grad(y, second, dy)
    h = scaled_glu(gate, up, scale, activation="gelu").detach()
    (expected,) = torch.autograd.grad(ia3_scale(h, second), second, dy)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    gate, up, scale = normal(9, 24), normal(9, 24), normal(24)

    def run(*leaves: Tensor) -> Tensor:
        return scaled_glu(*leaves, activation="silu")

    dy = torch.randn(9, 24)
    plain = torch.autograd.grad(run(gate, up, scale), (gate, up, scale), dy)
    checkpoint(run, gate, up, scale, use_reentrant=reentrant).backward(dy)
    for leaf, expected in zip((gate, up, scale), plain, strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": [1.0]}, TypeError, "gate: expected a tensor, got list"),
        ({"up": torch.ones(5, 9)}, ValueError, r"up: expected shape \[5, 8\], got \[5, 9\]"),
        ({"scale": torch.ones(9)}, ValueError, r"scale: expected shape \[8\], got \[9\]"),
        ({"up": None}, ValueError, r"scale: expected shape \[4\], got \[8\]"),
        ({"scale": torch.ones(8, dtype=torch.int64)}, TypeError, "scale: expected fp32"),
        ({"activation": "swoosh"}, ValueError, "activation: expected"),
        ({"gate": torch.ones(5, 7), "up": None}, ValueError, "gate: expected an even number"),
    ],
)
def test_wrong_arguments_are_named(change: Any, error: type[Exception], message: str) -> None:
    given = {"gate": torch.ones(5, 8), "up": torch.ones(5, 8), "scale": torch.ones(8)}
    with pytest.raises(error, match=message):
        scaled_glu(**{**given, "activation": "silu", **change})

"""glu and bias_activation as producers: a consumer saves nothing and rebuilds its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fasttune
from fasttune.ops import _recipe, bias_activation, glu
from fasttune.testing.conformance import backend

BF16, FP32 = torch.bfloat16, torch.float32


class Scale(torch.autograd.Function):
    """A consumer: x * w, which rebuilds x if it can and else saves it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.recipe = _recipe.available(x)
        ctx.save_for_backward(None if ctx.recipe else x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        if ctx.recipe:
            x = _recipe.rebuild(ctx, 0)
        return dy * w, dy * x if ctx.needs_input_grad[1] else None


def consume(x: Tensor, w: Tensor) -> Tensor:
    y: Tensor = Scale.apply(x, w)
    return y


PRODUCERS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "glu": (lambda g, u: glu(g, u, activation="silu"), [(3, 5, 24), (3, 5, 24)]),
    "packed": (
        lambda p: glu(p, activation="gelu_tanh", gate_first=False),
        [(3, 5, 48)],
    ),
    "bias": (lambda x, b: bias_activation(x, b, activation="gelu"), [(3, 5, 24), (24,)]),
    "no-bias": (lambda x: bias_activation(x, activation="relu2"), [(3, 5, 24)]),
}
ALL = pytest.mark.parametrize("name", sorted(PRODUCERS))


def build(name: str, dtype: torch.dtype = FP32) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The producer, and its inputs with the consumer's weight as the last."""
    produce, shapes = PRODUCERS[name]
    generator = torch.Generator().manual_seed(4)
    leaves = [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in (*shapes, (3, 5, 24))
    ]
    return produce, leaves


def expected(name: str, dtype: torch.dtype = FP32) -> list[Tensor]:
    """The gradients with a consumer that saves its input."""
    produce, leaves = build(name, dtype)
    out = produce(*leaves[:-1]) * leaves[-1]
    return list(torch.autograd.grad(out.sum(), leaves))


def assert_same(ours: Any, theirs: Any) -> None:
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)


@ALL
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kind", ["reference", "cpu", "triton"])
def test_rebuilt_output_is_bit_equal(name: str, dtype: torch.dtype, kind: str) -> None:
    produce, leaves = build(name, dtype)
    with backend(kind):
        y = produce(*leaves[:-1])
        assert _recipe.available(y)
        node: Any = y.grad_fn
        with fasttune.use_backend("cuda"):  # would raise if a backend were chosen again
            rebuilt = type(node)._forward_cls.rebuild(node, _recipe.saved(node))
    assert rebuilt.shape == y.shape and torch.equal(rebuilt, y)


@ALL
def test_consumer_saves_nothing_and_gets_the_same_gradients(name: str) -> None:
    produce, leaves = build(name)
    packed: list[int] = []
    x = produce(*leaves[:-1])
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t.data_ptr()) or t, lambda t: t
    ):
        out = consume(x, leaves[-1])
    assert x.data_ptr() not in packed
    assert_same(torch.autograd.grad(out.sum(), leaves), expected(name))


@ALL
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpoint(name: str, reentrant: bool) -> None:
    produce, leaves = build(name)
    out = checkpoint(lambda *t: consume(produce(*t[:-1]), t[-1]), *leaves, use_reentrant=reentrant)
    out.sum().backward()
    assert_same([leaf.grad for leaf in leaves], expected(name))


@ALL
def test_under_save_on_cpu(name: str) -> None:
    produce, leaves = build(name)
    with torch.autograd.graph.save_on_cpu():
        out = consume(produce(*leaves[:-1]), leaves[-1])
    assert_same(torch.autograd.grad(out.sum(), leaves), expected(name))


@ALL
def test_two_consumers_and_two_backwards(name: str) -> None:
    produce, leaves = build(name)
    x = produce(*leaves[:-1])
    out = consume(x, leaves[-1]) + consume(x, leaves[-1])
    want = [2 * gradient for gradient in expected(name)]
    for retain in (True, True, False):
        got = torch.autograd.grad(out.sum(), leaves, retain_graph=retain)
        assert_same(got, want)
        assert getattr(x.grad_fn, "_fasttune_output", None) is None  # freed after each


@ALL
def test_changed_output_is_no_recipe(name: str) -> None:
    produce, leaves = build(name)
    x = produce(*leaves[:-1])
    x *= 2
    assert not _recipe.available(x)
    out = consume(x, leaves[-1])
    want = [2 * gradient for gradient in expected(name)]
    assert_same(torch.autograd.grad(out.sum(), leaves), want)


@ALL
def test_output_that_is_changed_later_is_rebuilt_as_it_was(name: str) -> None:
    produce, leaves = build(name)
    x = produce(*leaves[:-1])
    out = consume(x, leaves[-1])
    with torch.no_grad():
        x.zero_()
    assert_same(torch.autograd.grad(out.sum(), leaves), expected(name))


@ALL
def test_changed_input_raises(name: str) -> None:
    produce, leaves = build(name)
    inputs = [leaf * 1 for leaf in leaves[:-1]]
    out = consume(produce(*inputs), leaves[-1])
    inputs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@ALL
def test_input_that_is_changed_between_two_backwards_raises(name: str) -> None:
    """The consumer's read has unpacked it; autograd's own check would not see the change."""
    produce, leaves = build(name)
    inputs = [leaf * 1 for leaf in leaves[:-1]]
    out = consume(produce(*inputs), leaves[-1])
    (gradient,) = torch.autograd.grad(out.sum(), leaves[-1], retain_graph=True)
    assert torch.equal(gradient, expected(name)[-1])
    inputs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@ALL
def test_gradient_of_the_consumers_parameter_only(name: str) -> None:
    produce, leaves = build(name)
    out = consume(produce(*leaves[:-1]), leaves[-1])
    (gradient,) = torch.autograd.grad(out.sum(), leaves[-1])
    assert torch.equal(gradient, expected(name)[-1])


@ALL
def test_consumer_without_gradient_for_its_input(name: str) -> None:
    """A consumer's backward that gives None for the producer's output frees what it kept."""

    class Ends(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            return x * w

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            return None, dy * _recipe.rebuild(ctx, 0)

    produce, leaves = build(name)
    x = produce(*leaves[:-1])
    Ends.apply(x, leaves[-1]).sum().backward()
    assert torch.equal(leaves[-1].grad, expected(name)[-1])
    assert all(leaf.grad is None for leaf in leaves[:-1])


@ALL
def test_a_dispatch_mode_sees_the_rebuilding_and_no_gradient_needs_none(name: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        forwards = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.forwards += func.name().endswith("_fwd")
            return func(*args, **(kwargs or {}))

    produce, leaves = build(name)
    with Seen() as seen:
        y = produce(*leaves[:-1])
        assert _recipe.available(y)
        node = y.grad_fn
        again = type(node)._forward_cls.rebuild(node, _recipe.saved(node))
    assert seen.forwards == 2 and torch.equal(again, y)
    with torch.no_grad():
        assert not _recipe.available(produce(*leaves[:-1]))
    assert not _recipe.available(leaves[0])

"""Recipes: a consumer that saves nothing for a norm's output rebuilds it, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fasttune.ops import _recipe, layer_norm, rms_norm
from fasttune.testing.conformance import backend

FP32, BF16 = torch.float32, torch.bfloat16
H, OUT = 48, 12


class _Product(torch.autograd.Function):
    """x @ a^T, which takes the recipe of x where there is one: what lora_linear does with it."""

    @staticmethod
    def forward(ctx, x, a):
        ctx.from_recipe = _recipe.available(x)
        ctx.save_for_backward(None if ctx.from_recipe else x, a)
        return x @ a.to(x.dtype).t()

    @staticmethod
    def backward(ctx, dy):
        x, a = ctx.saved_tensors
        if ctx.from_recipe:
            x = _recipe.rebuild(ctx, 0)
        need_dx, need_da = ctx.needs_input_grad
        rows = (-1, x.shape[-1])
        da = dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(rows) if need_da else None
        return dy @ a.to(dy.dtype) if need_dx else None, None if da is None else da.to(a.dtype)


product = _Product.apply

NORMS = {
    "rms": lambda x, weight, bias: rms_norm(x, weight, eps=1e-6),
    "rms-llama": lambda x, weight, bias: rms_norm(x, weight, eps=1e-6, round_first=True),
    "rms-plain": lambda x, weight, bias: rms_norm(x, eps=1e-6),
    "layer": lambda x, weight, bias: layer_norm(x, weight, bias, eps=1e-5),
    "layer-plain": lambda x, weight, bias: layer_norm(x, eps=1e-5),
}


class Setup:
    """Leaves, and the loss of two products of one norm."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(8)

        def leaf(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

        self.norm = NORMS[name]
        self.x, self.weight, self.bias = leaf(2, 9, H), leaf(H), leaf(H)
        self.a, self.b = leaf(OUT, H), leaf(OUT, H)
        self.leaves = [self.x, self.weight, self.bias, self.a, self.b]

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x, self.weight, self.bias)

    def products(self, y: torch.Tensor) -> torch.Tensor:
        return (product(y, self.a).float().square() + product(y, self.b).float().sin()).sum()

    def loss(self, x: torch.Tensor | None = None) -> torch.Tensor:
        return self.products(self.normed(self.x * 1 if x is None else x))

    def gradients(self, loss: torch.Tensor, **options: bool) -> list[torch.Tensor | None]:
        return list(torch.autograd.grad(loss, self.leaves, allow_unused=True, **options))

    def expected(self) -> list[torch.Tensor | None]:
        """The same without a recipe: the clone's node is no producer."""
        y = self.normed(self.x * 1).clone()
        assert not _recipe.available(y)
        return self.gradients(self.products(y))


def same(ours: list[torch.Tensor | None], theirs: list[torch.Tensor | None]) -> bool:
    return all(
        a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )  # fmt: skip


@pytest.fixture(params=sorted(NORMS))
def name(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16])
@pytest.mark.parametrize("where", ["reference", "cpu", "triton"])
def test_rebuilt_output_is_equal_bit_for_bit(name, where, dtype):
    setup = Setup(name, dtype)
    with backend(where):
        y = setup.normed(setup.x)
        assert _recipe.available(y)
        node = y.grad_fn
        again = type(node)._forward_cls.rebuild(node, _recipe.saved(node))
    assert again.dtype == y.dtype and again.shape == y.shape
    assert torch.equal(again, y)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gradients_are_those_without_a_recipe(name, dtype):
    setup = Setup(name, dtype)
    loss = setup.loss()
    assert same(setup.gradients(loss), setup.expected())


def test_the_consumer_saves_nothing_for_its_input(name):
    setup = Setup(name, FP32)
    y = setup.normed(setup.x)
    assert product(y, setup.a).grad_fn.saved_tensors[0] is None
    assert product(y.clone(), setup.a).grad_fn.saved_tensors[0] is not None


def test_it_is_rebuilt_once_for_all_consumers_and_then_let_go(name, monkeypatch):
    setup = Setup(name, FP32)
    y = setup.normed(setup.x * 1)
    node, calls = y.grad_fn, []
    original = type(node)._forward_cls.rebuild
    monkeypatch.setattr(
        type(node)._forward_cls, "rebuild", lambda *args: calls.append(1) or original(*args)
    )
    setup.products(y).backward(retain_graph=True)
    assert len(calls) == 1
    assert node._fasttune_output is None and node._fasttune_saved is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(name, reentrant):
    setup = Setup(name, BF16)
    loss = checkpoint(setup.loss, setup.x * 1, use_reentrant=reentrant)
    assert same(setup.gradients(loss) if not reentrant else backward(setup, loss), setup.expected())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_norm_with_consumers_outside(name, reentrant):
    setup = Setup(name, BF16)
    y = checkpoint(setup.normed, setup.x * 1, use_reentrant=reentrant)
    assert _recipe.available(y) != reentrant  # a reentrant checkpoint's output has its own node
    assert same(backward(setup, setup.products(y)), setup.expected())


def backward(setup: Setup, loss: torch.Tensor) -> list[torch.Tensor | None]:
    """As ``gradients``, by ``.backward()``: reentrant checkpointing supports nothing else."""
    loss.backward()
    return [leaf.grad for leaf in setup.leaves]


def test_saved_on_the_cpu(name):
    setup = Setup(name, FP32)
    with torch.autograd.graph.save_on_cpu():
        loss = setup.loss()
    assert same(setup.gradients(loss), setup.expected())


def test_two_backward_passes_with_retain_graph(name):
    setup = Setup(name, FP32)
    loss, expected = setup.loss(), setup.expected()
    assert same(setup.gradients(loss, retain_graph=True), expected)
    assert same(setup.gradients(loss, retain_graph=True), expected)
    assert same(setup.gradients(loss), expected)


def test_an_output_changed_in_place_has_no_recipe(name):
    setup = Setup(name, FP32)
    y = setup.normed(setup.x * 1)
    y.mul_(1.5)
    assert not _recipe.available(y)
    plain = setup.normed(setup.x * 1) * 1.5
    assert same(setup.gradients(setup.products(y)), setup.gradients(setup.products(plain)))


def test_an_output_changed_after_its_use_does_not_matter(name):
    """The consumer saved nothing, so nothing of it can be stale: autograd would have to raise."""
    setup = Setup(name, FP32)
    y = setup.normed(setup.x * 1)
    loss = setup.products(y)
    with torch.no_grad():
        y.zero_()
    assert same(setup.gradients(loss), setup.expected())


def test_an_input_changed_in_place_raises(name):
    setup = Setup(name, FP32)
    x = setup.x * 1
    loss = setup.loss(x)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        setup.gradients(loss)


def test_an_input_changed_between_two_backward_passes_raises(name):
    """The first pass ends at the consumer and leaves what it unpacked on the producer's node."""
    setup = Setup(name, FP32)
    x = setup.x * 1
    loss = setup.loss(x)
    torch.autograd.grad(loss, setup.a, retain_graph=True)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        setup.gradients(loss)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, setup.a)


def test_gradient_of_the_consumers_parameter_only(name):
    setup = Setup(name, FP32)
    loss = setup.loss()
    (da,) = torch.autograd.grad(loss, setup.a, retain_graph=True)
    expected = setup.expected()
    assert torch.equal(da, expected[3])
    assert same(setup.gradients(loss), expected)  # and all of them afterwards


def test_frozen_norm_of_an_input_without_gradient_has_no_node():
    x, weight = torch.randn(3, H), torch.randn(H)
    y = rms_norm(x, weight, eps=1e-6)
    assert not _recipe.available(y)
    a = torch.randn(OUT, H, requires_grad=True)
    product(y, a).sum().backward()
    assert torch.equal(a.grad, torch.ones(OUT, 3) @ y)


@pytest.mark.parametrize("train", ["x", "weight"])
def test_partly_trained_norms_have_recipes(train):
    x, weight = torch.randn(3, H), torch.randn(H)
    (x if train == "x" else weight).requires_grad_()
    a = torch.randn(OUT, H, requires_grad=True)
    y = rms_norm(x, weight, eps=1e-6)
    assert _recipe.available(y)
    product(y, a).sum().backward()
    assert torch.allclose(a.grad, torch.ones(OUT, 3) @ y.detach(), atol=1e-5)


def test_under_autocast_the_same_output_is_rebuilt():
    setup = Setup("rms", FP32)
    with torch.autocast("cpu", dtype=BF16):
        y = setup.normed(setup.x)
    again = type(y.grad_fn)._forward_cls.rebuild(y.grad_fn, _recipe.saved(y.grad_fn))
    assert torch.equal(again, y)

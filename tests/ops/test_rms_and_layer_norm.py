"""rms_norm and layer_norm beyond the conformance cases: whose formula they are, units in the last
place, recipes, bad input.
"""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fasttune import _native, use_backend
from fasttune.ops import _recipe, add_layer_norm, add_rms_norm, layer_norm, rms_norm

WIDTH = 72


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def transformers_norms():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    return [
        (LlamaRMSNorm, {"round_first": True}),
        (GemmaRMSNorm, {"weight_offset": 1.0}),
        (Olmo2RMSNorm, {}),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", range(3))
def test_the_reference_has_the_bits_of_transformers(index: int, dtype: torch.dtype) -> None:
    norm, options = transformers_norms()[index]
    module = norm(WIDTH, 1e-6).to(dtype)
    with torch.no_grad():
        module.weight.add_(rows(WIDTH, dtype=dtype) * 0.3)
    x = rows(5, 7, WIDTH, dtype=dtype)
    with use_backend("reference"):
        assert torch.equal(rms_norm(x, module.weight, eps=1e-6, **options), module(x))


def test_the_reference_of_layer_norm_has_the_bits_of_torch() -> None:
    x, weight, bias = rows(9, WIDTH), rows(WIDTH) + 1, rows(WIDTH)
    with use_backend("reference"):
        ours = layer_norm(x, weight, bias, eps=1e-5)
    assert torch.equal(ours, torch.nn.functional.layer_norm(x, (WIDTH,), weight, bias, 1e-5))


@pytest.mark.parametrize("build", _native.cpu().isa_available().split(","))
@pytest.mark.parametrize("name", ["rms_norm", "gemma", "layer_norm"])
def test_kernels_are_within_two_units_in_the_last_place(name: str, build: str) -> None:
    """Of the largest value of a row, from the reference; of an element's own size, three (RMS)."""
    x, weight = rows(64, 1000), rows(1000).abs() + 0.5
    calls = {
        "rms_norm": lambda: rms_norm(x, weight, eps=1e-6),
        "gemma": lambda: rms_norm(x, weight, eps=1e-6, weight_offset=1.0),
        "layer_norm": lambda: layer_norm(x, weight, None, eps=1e-6),
    }
    previous = _native.cpu().isa_name()
    _native.cpu().set_isa(build)
    try:
        with use_backend("cpu"):
            ours = calls[name]()
    finally:
        _native.cpu().set_isa(previous)
    with use_backend("reference"):
        reference = calls[name]()
    error = (ours - reference).abs() / torch.finfo(torch.float32).eps
    assert float((error / reference.abs().amax(-1, keepdim=True)).max()) <= 2
    if name != "layer_norm":  # whose values near the row's mean are left by a cancellation
        assert float((error / reference.abs()).max()) <= 3


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gradients_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    def gradients() -> list[Tensor]:
        leaves = [rows(700, WIDTH).requires_grad_(), (rows(WIDTH) + 1).requires_grad_()]
        leaves.append(rows(WIDTH).requires_grad_())
        y = layer_norm(*leaves, eps=1e-5) + rms_norm(*leaves[:2], eps=1e-5)
        return list(torch.autograd.grad(y.sin().sum(), leaves))

    before = torch.get_num_threads()
    expected = gradients()
    torch.set_num_threads(threads)
    try:
        for a, b in zip(gradients(), expected, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


class Consumer(torch.autograd.Function):
    """y W^T, which keeps y only if its producer cannot rebuild it."""

    kept: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx, y: Tensor, weight: Tensor) -> Tensor:
        ctx.recipe = _recipe.available(y)
        Consumer.kept.append(not ctx.recipe)
        ctx.save_for_backward(weight, None if ctx.recipe else y)
        return y @ weight.t()

    @staticmethod
    def backward(ctx, dz: Tensor):
        weight, y = ctx.saved_tensors
        y = _recipe.rebuild(ctx, 0) if ctx.recipe else y
        return dz @ weight, dz.flatten(0, -2).t() @ y.flatten(0, -2)


NORMS = {
    "rms_norm": lambda x, w, b: rms_norm(x, w, eps=1e-5, round_first=True),
    "layer_norm": lambda x, w, b: layer_norm(x, w, b, eps=1e-5),
}


def leaves() -> list[Tensor]:
    made = [rows(2, 9, WIDTH), rows(WIDTH) + 1, rows(WIDTH), rows(5, WIDTH), rows(6, WIDTH)]
    return [leaf.requires_grad_() for leaf in made]


def through_recipes(norm):
    def run(x: Tensor, w: Tensor, b: Tensor, first: Tensor, second: Tensor) -> Tensor:
        y = norm(x, w, b)
        return Consumer.apply(y, first).sin().sum() + Consumer.apply(y, second).cos().sum()

    return run


def plain(norm):
    def run(x: Tensor, w: Tensor, b: Tensor, first: Tensor, second: Tensor) -> Tensor:
        y = norm(x, w, b)
        return (y @ first.t()).sin().sum() + (y @ second.t()).cos().sum()

    return run


def gradients_of(run, tensors: list[Tensor]) -> list[Tensor | None]:
    run(*tensors).backward()
    return [tensor.grad for tensor in tensors]


def on_cpu(function):
    def run(*args: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return function(*args)

    return run


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: f,
        lambda f: lambda *a: checkpoint(f, *a, use_reentrant=False),
        lambda f: lambda *a: checkpoint(f, *a, use_reentrant=True),
        on_cpu,
    ],
    ids=["plain", "checkpoint", "reentrant checkpoint", "save_on_cpu"],
)
def test_recipes_give_the_same_gradients(name: str, wrap) -> None:
    Consumer.kept.clear()
    ours = gradients_of(wrap(through_recipes(NORMS[name])), leaves())
    assert Consumer.kept and not all(Consumer.kept)
    for a, b in zip(ours, gradients_of(plain(NORMS[name]), leaves()), strict=True):
        if b is not None:  # rms_norm has no bias
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NORMS)
def test_recipes_survive_a_second_backward(name: str) -> None:
    tensors = leaves()
    loss = through_recipes(NORMS[name])(*tensors)
    first = torch.autograd.grad(loss, [tensors[0], tensors[3]], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, [tensors[0], tensors[3]]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NORMS)
def test_an_in_place_change_of_the_output_drops_the_recipe(name: str) -> None:
    x, w, b, first, _ = leaves()
    y = NORMS[name](x, w, b)
    assert _recipe.available(y)
    y.mul_(2)
    assert not _recipe.available(y)
    ours = torch.autograd.grad(Consumer.apply(y, first).sin().sum(), [x, first])
    expected = torch.autograd.grad((2 * NORMS[name](x, w, b) @ first.t()).sin().sum(), [x, first])
    for a, c in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("name", NORMS)
def test_an_in_place_change_of_the_source_raises_as_autograd_does(name: str) -> None:
    x, w, b, first, _ = leaves()
    source = x * 1
    loss = Consumer.apply(NORMS[name](source, w, b), first).sum()
    source.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", NORMS)
def test_rebuilding_gives_the_same_bits(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves()[:3]]
        y = NORMS[name](*tensors)
        node = y.grad_fn
        again = type(node)._forward_cls.rebuild(node, _recipe.saved(node))
        assert torch.equal(again, y)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: rms_norm(x.long(), eps=1e-5), TypeError, "x: expected"),
        (lambda x: rms_norm(x, x, eps=1e-5), ValueError, "weight: expected shape"),
        (lambda x: rms_norm(x, eps="small"), TypeError, "eps: expected"),
        (lambda x: layer_norm(x, None, x, eps=1e-5), ValueError, "bias: expected shape"),
        (lambda x: layer_norm(torch.ones(()), eps=1e-5), ValueError, "at least one dimension"),
        (lambda x: add_rms_norm(x, x[:1], eps=1e-5), ValueError, "residual: expected shape"),
        (lambda x: add_layer_norm(x, 3, eps=1e-5), TypeError, "residual: expected a tensor"),
    ],
)
def test_bad_input_names_the_argument(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(rows(4, WIDTH))


def test_registered_ops_pass_opcheck() -> None:
    x, w, b = rows(6, WIDTH), rows(WIDTH) + 1, rows(WIDTH)
    ops = torch.ops.fasttune
    facts = (1e-5, 0.0, True, torch.float32)
    torch.library.opcheck(ops.rms_norm_fwd.default, (x, w, *facts))
    torch.library.opcheck(ops.add_rms_norm_fwd.default, (x, x.clone(), w, *facts))
    _, rstd = ops.rms_norm_fwd(x, w, *facts)
    torch.library.opcheck(ops.rms_norm_bwd.default, (x, x, w, rstd, None, 0.0, True, True))
    facts = (1e-5, 0.0, torch.float32)
    torch.library.opcheck(ops.layer_norm_fwd.default, (x, w, b, *facts))
    _, mean, rstd = ops.layer_norm_fwd(x, w, b, *facts)
    args = (x, x, w, mean, rstd, None, 0.0, True, True, True)
    torch.library.opcheck(ops.layer_norm_bwd.default, args)

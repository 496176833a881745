"""lora_linear beyond conformance: arguments, torch's dispatcher, threads and processes."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fasttune
from fasttune import _native, _registry
from fasttune.ops import LoraBranch, LoraProjection, lora_linear, lora_linear_group
from fasttune.ops.lora_linear import BACKWARD, FORWARD


def arguments(m=5, k=24, n=12, r=4):
    return torch.randn(m, k), torch.randn(n, k), torch.randn(r, k), torch.randn(n, r)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        (
            {"x": torch.ones(5, 24, dtype=torch.int64)},
            TypeError,
            "x: expected fp32, bf16, fp16 or fp64",
        ),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least one dimension"),
        (
            {"weight": torch.ones(12, 23)},
            ValueError,
            r"weight: expected shape \[any, 24\], got \[12, 23\]",
        ),
        ({"weight": torch.ones(12, 24).bfloat16()}, TypeError, "weight: expected x's dtype"),
        ({"a": torch.ones(4, 25)}, ValueError, r"a: expected shape \[any, 24\], got \[4, 25\]"),
        ({"b": torch.ones(12, 5)}, ValueError, r"b: expected shape \[12, 4\], got \[12, 5\]"),
        (
            {"b": torch.ones(12, 4, device="meta")},
            ValueError,
            "b: expected device cpu as x, got meta",
        ),
        ({"bias": torch.ones(11)}, ValueError, r"bias: expected shape \[12\]"),
        ({"lora_bias": torch.ones(12, 1)}, ValueError, "lora_bias: expected shape"),
        ({"scaling": torch.ones(2)}, ValueError, "scaling: expected shape"),
        (
            {"scaling": torch.tensor(1.0, requires_grad=True)},
            ValueError,
            "scaling: .* requires_grad",
        ),
        ({"seed": torch.tensor([1])}, ValueError, "seed: expected a 0-d int64 tensor"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    x, weight, a, b = arguments()
    given = {"x": x, "weight": weight, "a": a, "b": b, **change}
    with pytest.raises(error, match=message):
        lora_linear(**given)


@pytest.mark.parametrize(("name", "size"), [("rank_scale", 3), ("out_scale", 7)])
def test_wrong_scales_are_named(name, size):
    x, weight = torch.randn(5, 24), torch.randn(7, 24)
    branch = LoraBranch(torch.randn(3, 24), torch.randn(7, 3), **{name: torch.ones(size + 1)})
    with pytest.raises(ValueError, match=rf"{name}: expected shape \[{size}\]"):
        lora_linear_group(x, [LoraProjection(weight, None, (branch,))])


def test_a_group_equals_its_members():
    x, weight, a, b = arguments()
    x.requires_grad_()
    other = LoraProjection(
        torch.randn(7, 24), torch.randn(7), (LoraBranch(torch.randn(3, 24), torch.randn(7, 3)),)
    )
    first = LoraProjection(weight, None, (LoraBranch(a.requires_grad_(), b, 0.5),))
    ys = lora_linear_group(x, [first, other])
    singles = [lora_linear_group(x, [projection])[0] for projection in (first, other)]
    for grouped, single in zip(ys, singles, strict=True):
        assert torch.allclose(grouped, single, atol=1e-6)
    together = torch.autograd.grad(sum(y.sum() for y in ys), [x, a])
    apart = torch.autograd.grad(sum(y.sum() for y in singles), [x, a])
    for ours, theirs in zip(together, apart, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3)])
def test_outputs_own_their_memory_and_can_be_changed_in_place(lead):
    _, weight, a, b = arguments()
    x = torch.randn(*lead, 24)
    a.requires_grad_()
    y = lora_linear(x, weight, a, b)
    assert not y._is_view()
    y *= 2
    y.sum().backward()
    (expected,) = torch.autograd.grad((lora_linear(x, weight, a, b) * 2).sum(), a)
    assert torch.equal(a.grad, expected)


def test_expanded_gradient_of_an_empty_batch():
    _, weight, a, b = arguments()
    x = torch.zeros(0, 24, requires_grad=True)
    lora_linear(x, weight, a.requires_grad_(), b).sum().backward()
    assert x.grad.shape == (0, 24) and not bool(a.grad.any())


def op_arguments(thresholds=(6554,)):
    x, weight, a, b = arguments()
    return (
        x,
        [weight],
        [None],
        [a],
        [b],
        [None],
        [None],
        [1.5],
        list(thresholds),
        [1],
        [torch.tensor(3)],
        torch.float32,
        [None],
        [0],
    )


def test_opcheck():
    args = op_arguments()
    opcheck(FORWARD.registered, args)
    ys, ts = FORWARD.registered(*args)
    x, weights, _, a, b, _, scaling, scalings, thresholds, counts, seeds, dtype, _, streams = args
    needs = [True, True, True, True, True, False]
    facts = (scaling, scalings, thresholds, counts, seeds, dtype, needs, streams)
    opcheck(BACKWARD.registered, (ys, x, weights, a, b, ts, *facts))


def test_shows_in_profiles_and_dispatch_modes():
    from torch.profiler import profile
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, weight, a, b = arguments()
    a.requires_grad_()
    with Log():
        lora_linear(x, weight, a, b).sum().backward()
    assert {"fasttune.lora_linear_fwd.default", "fasttune.lora_linear_bwd.default"} <= set(seen)
    with profile() as recorded:
        lora_linear(x, weight, a, b)
    assert "fasttune::lora_linear_fwd" in {event.key for event in recorded.key_averages()}


def test_meta_tensors_have_the_right_shapes():
    x, weight, a, b = (t.to("meta").requires_grad_() for t in arguments())
    y = lora_linear(x, weight, a, b, dropout_p=0.1)
    assert (y.shape, y.device.type) == ((5, 12), "meta")
    y.sum().backward()
    assert a.grad.shape == a.shape and x.grad.shape == x.shape


def test_vmap_and_grad_of_torch_func():
    x, weight, a, b = arguments()
    batched = torch.vmap(lambda row: lora_linear(row, weight, a, b))(x)
    assert torch.allclose(batched, lora_linear(x, weight, a, b), atol=1e-5)
    gradient = torch.func.grad(lambda f: lora_linear(x, weight, f, b).sum())(a)
    a.requires_grad_()
    lora_linear(x, weight, a, b).sum().backward()
    assert torch.allclose(gradient, a.grad, atol=1e-4)


def test_forced_backends(monkeypatch):
    x, weight, a, b = arguments()
    a.requires_grad_()
    with fasttune.use_backend("reference"):
        assert lora_linear(x, weight, a, b).grad_fn.backend.name == "reference"
    assert lora_linear(x, weight, a, b).grad_fn.backend.name == "cpu"
    with (
        fasttune.use_backend("cuda"),
        pytest.raises(fasttune.BackendError, match="backend 'cuda' was asked for, but"),
    ):
        lora_linear(x, weight, a, b)
    with (
        pytest.raises(ValueError, match="use_backend: expected one of"),
        fasttune.use_backend("gpu"),
    ):
        pass
    monkeypatch.setattr(_registry, "forced_by_environment", "refrence")
    with pytest.raises(ValueError, match="FASTTUNE_BACKEND: expected one of"):
        lora_linear(x, weight, a, b)


def test_backward_runs_on_the_backend_of_the_forward():
    x, weight, a, b = arguments()
    a.requires_grad_()
    with fasttune.use_backend("reference"):
        y = lora_linear(x, weight, a, b)
    with fasttune.use_backend("cuda"):  # would raise if it were asked again
        y.sum().backward()
    assert a.grad is not None


def test_rank_above_the_limit_gives_a_reason():
    x, weight, a, b = arguments(r=300)
    assert "ranks up to 256" in FORWARD.reasons(x, [weight], [None], [a], [b])["cpu"]
    with fasttune.use_backend("cpu"), pytest.raises(fasttune.BackendError, match="ranks up to 256"):
        lora_linear(x, weight, a, b)
    assert torch.isfinite(lora_linear(x, weight, a, b)).all()  # the reference takes it


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_thread_counts_give_the_same_bits(threads):
    """Every reduction has one fixed order, whatever the number of threads."""
    before = torch.get_num_threads()
    x, _, a, b = arguments(m=517, k=200, n=130, r=16)
    dy = torch.randn(517, 130)
    seed = torch.tensor(7)
    options = {"seed": seed, "threshold": 3277, "branch": 0}

    def run():
        t = _native.lora_down(x, a, 1.0, None, **options)
        d, db = _native.lora_up_backward(dy, t, b, 1.0, None, need_d=True, need_db=True)
        dx, da = _native.lora_down_backward(
            d, a, x, **options, dx_dtype=torch.float32, need_dx=True, need_da=True
        )
        return t, d, db, dx, da

    try:
        torch.set_num_threads(1)
        expected = run()
        torch.set_num_threads(threads)
        for ours, theirs in zip(run(), expected, strict=True):
            assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(before)


def _child(connection, args):
    connection.send(lora_linear(*args).detach().numpy())


def test_works_after_fork():
    """As in a DataLoader worker: the parent's OpenMP team does not exist in the child."""
    args = arguments(m=300)
    expected = lora_linear(*args)
    here, there = multiprocessing.Pipe()
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what a DataLoader worker does
    try:
        process = multiprocessing.get_context("fork").Process(target=_child, args=(there, args))
        process.start()
        assert here.poll(60), "the forked child hangs"
        assert torch.allclose(torch.from_numpy(here.recv()), expected, atol=1e-5)
        process.join(10)
        assert process.exitcode == 0
    finally:
        torch.set_num_threads(torch_threads)


def test_openmp_is_shared_with_torch():
    """One OpenMP runtime in the process: a second one would fight torch's threads."""
    _native.cpu()
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) == 1, runtimes


@pytest.mark.parametrize("first", ["none", "all"])
def test_seed_is_drawn_only_for_dropout(first):
    args = arguments()
    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)
    lora_linear(*args, dropout_p=0.0 if first == "none" else 0.5)
    assert (torch.rand(()) == expected) == (first == "none")


def test_a_group_of_a_weight_and_of_the_output_of_a_base():
    x, weight, a, b = arguments()
    base = torch.randn(5, 12)
    leaves = [t.requires_grad_() for t in (x, weight, a, b, base)]

    def group(x, weight, a, b, base):
        branches = (LoraBranch(a, b),)
        own = LoraProjection(weight, None, branches)
        return lora_linear_group(x, (own, LoraProjection(None, None, branches, base)))

    def formula(x, weight, a, b, base):
        branch = x @ a.t() @ b.t()
        return x @ weight.t() + branch, base + branch

    dys = [torch.randn(5, 12), torch.randn(5, 12)]
    found, expected = (torch.autograd.grad(f(*leaves), leaves, dys) for f in (group, formula))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_selective_checkpoints_keep_what_a_layer_returned():
    x, weight, a, b = arguments()
    x = x.reshape(1, 5, 24)
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def run(x, a, b):
        return lora_linear(x, weight, a, b).square()

    def context():
        return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.MUST_SAVE)

    kept = checkpoint(run, *leaves, use_reentrant=False, context_fn=context)
    found = torch.autograd.grad(kept.sum(), leaves)
    for ours, theirs in zip(found, torch.autograd.grad(run(*leaves).sum(), leaves), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6)


def test_a_layer_is_traced():
    x, weight, a, b = arguments()
    x = x.reshape(1, 5, 24)
    a.requires_grad_()
    traced = make_fx(lambda x: lora_linear(x, weight, a, b))(x)
    other = torch.randn(1, 5, 24)
    assert torch.equal(traced(other), lora_linear(other, weight, a, b))


@pytest.mark.parametrize("negated", range(4))
def test_a_view_that_is_negated_as_it_is_read(negated):
    """What ``z.conj().imag`` gives: torch negates it in every operator, a kernel reads memory."""
    tensors = list(arguments())
    tensors[negated] = torch._neg_view(tensors[negated])
    leaves = [t.detach().requires_grad_() for t in tensors]
    assert leaves[negated].is_neg()
    x, weight, a, b = leaves
    expected = x @ weight.t() + x @ a.t() @ b.t()
    y = lora_linear(*leaves)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
    dy = torch._neg_view(torch.randn(5, 12))
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-4)

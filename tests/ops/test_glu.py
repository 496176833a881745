"""glu beyond conformance: arguments, layouts, torch's dispatcher, threads, huge strides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.library import opcheck

import fasttune
from fasttune import _native
from fasttune.ops import glu
from fasttune.ops.glu import BACKWARD, FORWARD
from fasttune.testing.accounting import count
from fasttune.testing.conformance import backend

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": [1.0]}, TypeError, "gate: expected a tensor, got list"),
        ({"gate": torch.ones(5, 24).long()}, TypeError, "gate: expected fp32, bf16, fp16 or fp64"),
        ({"gate": torch.tensor(1.0)}, ValueError, "gate: expected at least one dimension"),
        ({"up": 3}, TypeError, "up: expected a tensor, got int"),
        ({"up": torch.ones(5, 24).int()}, TypeError, "up: expected fp32, bf16, fp16 or fp64"),
        ({"up": torch.ones(5, 1)}, ValueError, r"up: expected shape \[5, 24\], got \[5, 1\]"),
        ({"up": torch.ones(24)}, ValueError, r"up: expected shape \[5, 24\], got \[24\]"),
        (
            {"up": torch.ones(5, 24, device="meta")},
            ValueError,
            "up: expected device cpu as gate, got meta",
        ),
        (
            {"gate": torch.ones(5, 7), "up": None},
            ValueError,
            "gate: expected an even number of columns without up, got 7",
        ),
        ({"activation": "swish"}, ValueError, "activation: expected one of silu, .*, got 'swish'"),
        ({"activation": 3}, TypeError, "activation: expected a name, got int"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    given = {"gate": torch.ones(5, 24), "up": torch.ones(5, 24), "activation": "silu", **change}
    with pytest.raises(error, match=message):
        glu(given.pop("gate"), given.pop("up"), **given)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("kind", ["reference", "cpu", "triton"])
def test_packed_equals_two_tensors_bit_for_bit(kind, gate_first):
    packed = torch.randn(3, 5, 42, dtype=BF16, requires_grad=True)
    first, second = (half.detach().clone() for half in packed.chunk(2, -1))
    gate, up = (first, second) if gate_first else (second, first)
    gate.requires_grad_()
    up.requires_grad_()
    dy = torch.randn(3, 5, 21, dtype=BF16)
    with backend(kind):
        y = glu(packed, activation="gelu", gate_first=gate_first)
        expected = glu(gate, up, activation="gelu")
        (gradient,) = torch.autograd.grad(y, packed, dy)
        dgate, dup = torch.autograd.grad(expected, [gate, up], dy)
    assert torch.equal(y, expected) and gradient.is_contiguous()
    halves = (dgate, dup) if gate_first else (dup, dgate)
    assert torch.equal(gradient, torch.cat(halves, -1))


def test_saved_are_the_arguments_themselves():
    gate, up = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    saved = glu(gate, up, activation="silu").grad_fn.saved_tensors
    assert saved[0] is gate and saved[1] is up
    packed = torch.randn(4, 16, requires_grad=True)
    saved = glu(packed, activation="silu").grad_fn.saved_tensors
    assert saved[0] is packed and saved[1] is None


def test_gate_and_up_may_be_one_tensor():
    x = torch.randn(4, 8, requires_grad=True)
    glu(x, x, activation="tanh").sum().backward()
    other = x.detach().clone().requires_grad_()
    (torch.tanh(other) * other).sum().backward()
    assert torch.allclose(x.grad, other.grad, atol=1e-6)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3)])
def test_outputs_own_their_memory_and_can_be_changed_in_place(lead):
    gate = torch.randn(*lead, 24, requires_grad=True)
    up = torch.randn(*lead, 24)
    y = glu(gate, up, activation="silu")
    assert not y._is_view()
    y *= 2
    y.sum().backward()
    (expected,) = torch.autograd.grad((glu(gate, up, activation="silu") * 2).sum(), gate)
    assert torch.equal(gate.grad, expected)


def test_expanded_operands_and_gradients():
    gate = torch.randn(1, 24, requires_grad=True)
    up = torch.randn(6, 1, requires_grad=True)
    y = glu(gate.expand(6, 24), up.expand(6, 24), activation="silu")
    y.sum().backward()
    other = [t.detach().clone().requires_grad_() for t in (gate, up)]
    (torch.nn.functional.silu(other[0]) * other[1]).sum().backward()
    for ours, theirs in zip((gate, up), other, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)


def test_a_second_derivative_raises():
    gate = torch.randn(4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        glu(gate, gate.detach(), activation="silu").sum(), gate, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    gate, up = torch.randn(5, 24), None if packed else torch.randn(5, 24, dtype=BF16)
    opcheck(FORWARD.registered, (gate, up, "gelu", False))
    dy = FORWARD.registered(gate, up, "gelu", False)
    for needs in ([True, False],) if packed else ([True, True], [True, False], [False, True]):
        opcheck(BACKWARD.registered, (dy, gate, up, "gelu", False, needs))


def test_shows_in_profiles_and_dispatch_modes():
    from torch.profiler import profile
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    gate = torch.randn(5, 24, requires_grad=True)
    with Log():
        glu(gate, activation="silu").sum().backward()
    assert {"fasttune.glu_fwd.default", "fasttune.glu_bwd.default"} <= set(seen)
    with profile() as recorded:
        glu(gate, activation="silu")
    assert "fasttune::glu_fwd" in {event.key for event in recorded.key_averages()}


def test_meta_tensors_have_the_right_shapes():
    packed = torch.empty(2, 5, 24, dtype=BF16, device="meta", requires_grad=True)
    y = glu(packed, activation="silu")
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 12), BF16, "meta")
    y.sum().backward()
    assert packed.grad.shape == packed.shape


def test_vmap_and_grad_of_torch_func():
    gate, up = torch.randn(5, 24), torch.randn(5, 24)
    batched = torch.vmap(lambda g, u: glu(g, u, activation="silu"))(gate, up)
    assert torch.allclose(batched, glu(gate, up, activation="silu"), atol=1e-6)
    gradient = torch.func.grad(lambda g: glu(g, up, activation="silu").sum())(gate)
    gate.requires_grad_()
    glu(gate, up, activation="silu").sum().backward()
    assert torch.allclose(gradient, gate.grad, atol=1e-6)


def test_backward_runs_on_the_backend_of_the_forward():
    gate = torch.randn(5, 24, requires_grad=True)
    with fasttune.use_backend("reference"):
        y = glu(gate, activation="silu")
    assert y.grad_fn.backend.name == "reference"
    with fasttune.use_backend("cuda"):  # would raise if it were asked again
        y.sum().backward()
    assert glu(gate, activation="silu").grad_fn.backend.name == "cpu"


def test_counts():
    """One launch each way, every argument once; nothing but the arguments is saved."""
    rows, width = 512, 1376
    gate, up = (
        torch.empty(rows, width, dtype=BF16, device="meta", requires_grad=True) for _ in range(2)
    )
    counts = count(lambda g, u: glu(g, u, activation="silu"), gate, up)
    size = rows * width * 2
    assert counts.total.opaque.calls == 0
    assert (counts.forward.calls, counts.forward.bytes_moved) == (1, 3 * size)
    assert (counts.backward.calls, counts.backward.bytes_moved) == (1, 5 * size)
    assert counts.saved_bytes == 0
    stock = count(lambda g, u: torch.nn.functional.silu(g) * u, gate, up)
    assert counts.bytes_moved < 0.75 * stock.bytes_moved and stock.saved_bytes == size
    frozen = count(lambda g, u: glu(g, u, activation="silu"), gate.detach(), up)
    assert frozen.backward.bytes_moved == 3 * size


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("contiguous", [True, False])
def test_thread_counts_give_the_same_bits(threads, contiguous):
    before = torch.get_num_threads()
    packed, dy = torch.randn(317, 2 * 517, dtype=BF16), torch.randn(317, 517, dtype=BF16)
    gate, up = packed.chunk(2, -1)
    if contiguous:
        gate, up = gate.contiguous(), up.contiguous()

    def run():
        y = _native.glu_forward(gate, up, activation="gelu_tanh")
        grads = [torch.empty_like(dy), torch.empty_like(dy)]
        _native.glu_backward(dy, gate, up, activation="gelu_tanh", dgate=grads[0], dup=grads[1])
        return y, *grads

    try:
        torch.set_num_threads(1)
        expected = run()
        torch.set_num_threads(threads)
        for ours, theirs in zip(run(), expected, strict=True):
            assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["cpu", "triton"])
def test_rows_that_lie_far_apart(tmp_path: Path, kind):
    """Offsets beyond 2^31 elements by strides below it, in a file whose holes take no space."""
    stride, path = 2**30 + 16, str(tmp_path / "sparse")
    flat = torch.from_file(path, shared=True, size=2 * stride + 64, dtype=BF16)
    wide = flat.as_strided((3, 64), (stride, 1))
    wide.copy_(torch.randn(3, 64))
    with backend(kind):
        y = glu(wide, activation="silu")
    assert torch.equal(y, glu(wide.clone(), activation="silu"))

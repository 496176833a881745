"""bias_activation beyond conformance: arguments, torch's dispatcher, threads, sums of columns."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import fasttune
from fasttune import _native
from fasttune.ops import bias_activation
from fasttune.ops.bias_activation import BACKWARD, FORWARD
from fasttune.testing.accounting import count
from fasttune.testing.conformance import backend

BF16 = torch.bfloat16
BUILDS = [f"cpu:{isa}" for isa in _native.cpu().isa_available().split(",")]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.ones(5, 24).long()}, TypeError, "x: expected fp32, bf16, fp16 or fp64"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least one dimension"),
        ({"bias": 1.0}, TypeError, "bias: expected a tensor, got float"),
        ({"bias": torch.ones(23)}, ValueError, r"bias: expected shape \[24\], got \[23\]"),
        ({"bias": torch.ones(1, 24)}, ValueError, r"bias: expected shape \[24\], got \[1, 24\]"),
        (
            {"bias": torch.ones(24, device="meta")},
            ValueError,
            "bias: expected device cpu as x, got meta",
        ),
        ({"activation": "Silu"}, ValueError, "activation: expected one of silu, .*, got 'Silu'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    given = {"x": torch.ones(5, 24), "bias": torch.ones(24), "activation": "silu", **change}
    with pytest.raises(error, match=message):
        bias_activation(given.pop("x"), given.pop("bias"), **given)


def test_saved_are_the_arguments_themselves():
    x, bias = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    saved = bias_activation(x, bias, activation="silu").grad_fn.saved_tensors
    assert saved[0] is x and saved[1] is bias


def test_the_sum_before_the_activation_is_not_rounded():
    """256 + 1 has no bf16, and relu2 of it has none either way; sigmoid near 0 shows the bits."""
    x = torch.full((1, 16), -256.0, dtype=BF16)
    bias = torch.full((16,), 255.5, dtype=torch.float32)
    assert (bias.to(BF16) != bias).all()
    y = bias_activation(x, bias, activation="sigmoid")
    assert y.dtype == torch.float32
    assert torch.allclose(y, torch.sigmoid(torch.tensor(-0.5)).expand(1, 16), rtol=1e-6)


@pytest.mark.parametrize("strided", [False, True])
def test_bias_may_be_strided(strided):
    x, bias = torch.randn(5, 24), torch.randn(48)[::2]
    for kind in ("reference", "cpu", "triton"):
        with backend(kind):
            y = bias_activation(x, bias if strided else bias.contiguous(), activation="tanh")
        assert torch.allclose(y, torch.tanh(x + bias), atol=1e-6)


def test_a_frozen_bias_costs_no_sum(monkeypatch):
    def refuse(x):
        raise AssertionError("column_sum was called")

    monkeypatch.setattr(_native, "column_sum", refuse)
    x, bias = torch.randn(5, 24, requires_grad=True), torch.randn(24)
    bias_activation(x, bias, activation="silu").sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3)])
def test_outputs_own_their_memory_and_can_be_changed_in_place(lead):
    x, bias = torch.randn(*lead, 24, requires_grad=True), torch.randn(24)
    y = bias_activation(x, bias, activation="silu")
    assert not y._is_view()
    y *= 2
    y.sum().backward()
    again = bias_activation(x, bias, activation="silu") * 2
    assert torch.equal(x.grad, torch.autograd.grad(again.sum(), x)[0])


def test_a_second_derivative_raises():
    x = torch.randn(4, 8, requires_grad=True)
    y = bias_activation(x, activation="gelu")
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias):
    x, bias = torch.randn(5, 24, dtype=BF16), torch.randn(24) if with_bias else None
    opcheck(FORWARD.registered, (x, bias, "silu"))
    dy = FORWARD.registered(x, bias, "silu")
    for needs in ([True, True], [True, False], [False, True]) if with_bias else ([True, False],):
        opcheck(BACKWARD.registered, (dy, x, bias, "silu", needs))


def test_shows_in_dispatch_modes():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(5, 24, requires_grad=True)
    with Log():
        bias_activation(x, activation="silu").sum().backward()
    assert {"fasttune.bias_activation_fwd.default", "fasttune.bias_activation_bwd.default"} <= set(
        seen
    )


def test_meta_tensors_have_the_right_shapes():
    x = torch.empty(2, 5, 24, dtype=BF16, device="meta", requires_grad=True)
    bias = torch.empty(24, device="meta", requires_grad=True)
    y = bias_activation(x, bias, activation="silu")
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 24), torch.float32, "meta")
    y.sum().backward()
    assert x.grad.dtype == BF16 and bias.grad.dtype == torch.float32


def test_vmap_and_grad_of_torch_func():
    x, bias = torch.randn(5, 24), torch.randn(24)
    expected = bias_activation(x, bias, activation="gelu")
    batched = torch.vmap(lambda row: bias_activation(row, bias, activation="gelu"))(x)
    assert torch.allclose(batched, expected, atol=1e-6)
    gradient = torch.func.grad(lambda b: bias_activation(x, b, activation="gelu").sum())(bias)
    bias.requires_grad_()
    bias_activation(x, bias, activation="gelu").sum().backward()
    assert torch.allclose(gradient, bias.grad, atol=1e-5)


def test_backward_runs_on_the_backend_of_the_forward():
    x = torch.randn(5, 24, requires_grad=True)
    with fasttune.use_backend("reference"):
        y = bias_activation(x, activation="silu")
    with fasttune.use_backend("cuda"):  # would raise if it were asked again
        y.sum().backward()
    assert y.grad_fn.backend.name == "reference" and x.grad is not None


def test_counts():
    rows, width = 512, 1376
    x = torch.empty(rows, width, dtype=BF16, device="meta", requires_grad=True)
    bias = torch.empty(width, dtype=BF16, device="meta", requires_grad=True)
    size, row = rows * width * 2, width * 2
    counts = count(lambda x, b: bias_activation(x, b, activation="silu"), x, bias)
    assert counts.total.opaque.calls == 0
    assert (counts.forward.calls, counts.forward.bytes_moved) == (1, 2 * size + row)
    frozen = count(lambda x, b: bias_activation(x, b, activation="silu"), x, bias.detach())
    assert (frozen.backward.calls, frozen.backward.bytes_moved) == (1, 3 * size + row)
    # The sum of columns reads dx again; its fp32 result is cast to the dtype of bias.
    summed = [launch for launch in counts.backward.launches if "column_sum" in launch.name]
    assert sum(launch.bytes_read for launch in summed) >= size
    assert counts.saved_bytes == 0


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("cols", [1, 37, 1500])
def test_thread_counts_give_the_same_bits(threads, cols):
    before = torch.get_num_threads()
    x, dy = torch.randn(1100, cols, dtype=BF16), torch.randn(1100, cols, dtype=BF16)
    bias = torch.randn(cols)

    def run():
        y = _native.bias_activation_forward(x, bias, activation="gelu")
        dx = _native.bias_activation_backward(
            dy, x, bias, activation="gelu", dx_dtype=torch.float32
        )
        return y, dx, _native.column_sum(dx), _native.column_sum(dy)

    try:
        torch.set_num_threads(1)
        expected = run()
        torch.set_num_threads(threads)
        for ours, theirs in zip(run(), expected, strict=True):
            assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("shape", [(0, 5), (1, 3), (256, 16), (257, 33), (1025, 1030)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_column_sum_is_exact_on_integers(build, shape, dtype):
    """Small integers add without rounding, so every element must be counted once."""
    x = torch.randint(-8, 8, (shape[0], 2 * shape[1])).to(dtype)[:, : shape[1]]
    with backend(build):
        total = _native.column_sum(x)
    assert torch.equal(total, x.double().sum(0).float())

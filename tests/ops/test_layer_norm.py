"""layer_norm beyond conformance: torch's bits, accuracy, arguments, torch's dispatcher, saving."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

import fasttune
from fasttune import _native
from fasttune.ops import add_layer_norm, layer_norm
from fasttune.ops._layer_norm_backends import ADD_FORWARD, BACKWARD, FORWARD
from fasttune.testing import numerics
from fasttune.testing.accounting import count
from fasttune.testing.conformance import backend

FP32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-5
BUILDS = [f"cpu:{isa}" for isa in _native.cpu().isa_available().split(",")]
KERNELS = [*BUILDS, "triton"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("features", [1, 33, 320, 4096])
def test_reference_gives_the_bits_of_torch_in_fp32(features, bias):
    module = torch.nn.LayerNorm(features, EPS, bias=bias)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = 3 * torch.randn(2, 37, features) + 1
    with fasttune.use_backend("reference"):
        y = layer_norm(x, module.weight, module.bias, eps=EPS)
    assert torch.equal(y, module(x))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_reference_gives_the_numbers_of_transformers(dtype):
    olmo, cohere, nemotron = OlmoLayerNorm(96), CohereLayerNorm(96, EPS), NemotronLayerNorm1P(96)
    for module in (cohere, nemotron):
        for parameter in module.to(dtype).parameters():
            torch.nn.init.normal_(parameter)
    x = torch.randn(2, 7, 96).to(dtype)
    with fasttune.use_backend("reference"):
        assert torch.equal(layer_norm(x, eps=EPS), olmo(x))
        ours = layer_norm(x, cohere.weight, eps=EPS)
        offset = layer_norm(x, nemotron.weight, nemotron.bias, eps=EPS, weight_offset=1.0)
    # Cohere spells the formula out, which rounds elsewhere in fp32; Nemotron rounds 1 + weight to
    # 16 bits, half an ulp of two factors each.
    truth = layer_norm(x.double(), cohere.weight.double(), eps=EPS)
    numerics.check("cohere", ours, cohere(x), truth)
    truth = layer_norm(
        x.double(), nemotron.weight.double(), nemotron.bias.double(), eps=EPS, weight_offset=1.0
    )
    numerics.check("nemotron", offset, nemotron(x), truth)


@pytest.mark.parametrize("center", [0.0, 10.0])
@pytest.mark.parametrize("features", [33, 64, 576, 4096, 16384])
@pytest.mark.parametrize("name", ["reference", *KERNELS])
def test_fp32_results_are_within_a_few_ulp_of_the_truth(name, features, center):
    """Elementwise, with ulp = eps times the size of the terms of y, so away from cancellation.

    x rstd, mean rstd and the bias are terms of y. The mean is off by one ulp or two (its sum and
    the division), the deviation, the root, the reciprocal, two products and the addition by half
    an ulp each: 4.5.
    """
    x, weight, bias = (
        torch.randn(24, features) + center,
        torch.randn(features),
        torch.randn(features),
    )
    wide = x.double()
    truth = layer_norm(wide, weight.double(), bias.double(), eps=EPS)
    with backend(name):
        y = layer_norm(x, weight, bias, eps=EPS)
    rstd = (wide.var(-1, unbiased=False, keepdim=True) + EPS).rsqrt()
    mean = wide.mean(-1, keepdim=True).abs()
    size = (wide.abs() + mean) * rstd * weight.double().abs() + bias.double().abs()
    assert bool(((y.double() - truth).abs() <= 4.5 * torch.finfo(FP32).eps * size).all())


@pytest.mark.parametrize("name", KERNELS)
def test_a_distant_mean_costs_no_more_than_its_own_rounding(name):
    """The variance is that of the deviations: E(x^2) - E(x)^2 would lose all digits here."""
    x = torch.randn(16, 1000) + 4096.0
    with backend(name):
        y = layer_norm(x, eps=EPS)
    truth = layer_norm(x.double(), eps=EPS)
    # The mean is rounded to 2^-12 at most, and the deviations are about 1.
    assert float((y.double() - truth).abs().max()) < 2**-11


@pytest.mark.parametrize("name", BUILDS)
def test_a_row_does_not_depend_on_its_neighbours_or_the_threads(name):
    before = torch.get_num_threads()
    x, weight, bias = torch.randn(203, 300).to(BF16), torch.randn(300), torch.randn(300)
    dy = torch.randn(203, 300)
    facts = {"eps": EPS, "weight_offset": 0.0, "out_dtype": FP32}
    needs = {"weight_offset": 0.0, "need_dx": True, "need_dweight": True, "need_dbias": True}

    def run(rows):
        y, *stats = _native.layer_norm_forward(x[rows], weight, bias, **facts)
        return y, *_native.layer_norm_backward(dy[rows], x[rows], weight, *stats, None, **needs)

    try:
        with backend(name):
            torch.set_num_threads(1)
            y, dx, *sums = run(slice(None))
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                assert all(map(torch.equal, run(slice(None)), (y, dx, *sums)))
            for row in (0, 3, 202):
                alone = run(slice(row, row + 1))
                assert torch.equal(alone[0][0], y[row]) and torch.equal(alone[1][0], dx[row])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", KERNELS)
def test_constant_rows_give_the_bias(name):
    """A variance of zero: eps keeps the root finite, and rounding must not make it negative."""
    x, bias = torch.full((5, 100), 0.1), torch.randn(100)
    with backend(name):
        y = layer_norm(x, None, bias, eps=EPS)
    # The mean is off by an ulp of 0.1 at most, times rstd = 1 / sqrt(eps).
    assert float((y - bias).abs().max()) <= 0.1 * torch.finfo(FP32).eps * EPS**-0.5 * 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "x: expected a tensor, got NoneType"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least one dimension"),
        ({"weight": torch.ones(23)}, ValueError, r"weight: expected shape \[24\], got \[23\]"),
        ({"bias": torch.ones(5, 24)}, ValueError, r"bias: expected shape \[24\]"),
        ({"bias": torch.ones(24).long()}, TypeError, "bias: expected fp32"),
        ({"eps": "1e-5"}, TypeError, "eps: expected a number, got str"),
        (
            {"residual": torch.ones(5, 24, device="meta")},
            ValueError,
            "residual: expected device cpu as x, got meta",
        ),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    given = {"x": torch.randn(5, 24), "weight": torch.randn(24), "eps": EPS, **change}
    with pytest.raises(error, match=message):
        (add_layer_norm if "residual" in change else layer_norm)(**given)


def test_opcheck():
    x, residual = torch.randn(5, 24), torch.randn(5, 24)
    weight, bias = torch.randn(24), torch.randn(24)
    facts = (EPS, 1.0, FP32)
    opcheck(FORWARD.registered, (x, weight, bias, *facts))
    opcheck(FORWARD.registered, (x, None, None, *facts))
    opcheck(ADD_FORWARD.registered, (x, residual, weight, bias, *facts))
    dy, mean, rstd = FORWARD.registered(x, weight, bias, *facts)
    opcheck(BACKWARD.registered, (dy, x, weight, mean, rstd, residual, 1.0, True, True, True))
    opcheck(BACKWARD.registered, (dy, x, None, mean, rstd, None, 1.0, False, False, True))


def test_only_needed_gradients_are_computed(monkeypatch):
    seen = []
    original = _native.layer_norm_backward
    monkeypatch.setattr(
        _native, "layer_norm_backward", lambda *a, **k: seen.append(k) or original(*a, **k)
    )
    for flags in ((True, False, False), (False, False, True), (True, True, False), (True,) * 3):
        leaves = [
            tensor.requires_grad_(flag)
            for tensor, flag in zip(
                (torch.randn(5, 24), torch.randn(24), torch.randn(24)), flags, strict=True
            )
        ]
        layer_norm(*leaves, eps=EPS).sum().backward()
        needs = tuple(seen[-1][f"need_{name}"] for name in ("dx", "dweight", "dbias"))
        assert needs == flags == tuple(leaf.grad is not None for leaf in leaves)


def test_saves_x_as_it_came_and_two_numbers_a_row():
    weight, bias = (torch.nn.Parameter(torch.randn(64)) for _ in range(2))
    x = torch.randn(2, 9, 64, dtype=BF16, requires_grad=True)
    counts = count(lambda x: layer_norm(x * 1, weight, bias, eps=EPS), x)
    assert counts.saved_bytes == x.numel() * 2 + 2 * 18 * 4
    assert counts.total.opaque.calls == 0
    assert sum("fasttune" in launch.name for launch in counts.backward.launches) == 3


def test_rows_too_long_for_their_sums_take_a_kernel_of_their_own():
    weight = torch.randn(16384, device="meta", requires_grad=True)
    x = torch.randn(512, 16384, device="meta", requires_grad=True)
    counts = count(lambda x: layer_norm(x, weight, eps=EPS), x)
    names = [launch.name.removeprefix("fasttune::") for launch in counts.backward.launches]
    assert names == [
        "layer_norm_backward",
        "layer_norm_backward.columns",
        "layer_norm_backward.dweight",
    ]


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0, 3)])
def test_outputs_own_their_memory_and_can_be_changed_in_place(lead):
    x = torch.randn(*lead, 24, requires_grad=True)
    for outputs in ((layer_norm(x, eps=EPS),), add_layer_norm(x, x.detach(), eps=EPS)):
        for y in outputs:
            assert not y._is_view()
            y *= 2


def test_the_sum_alone_passes_its_gradient_to_both():
    x, residual = (torch.randn(3, 24, requires_grad=True) for _ in range(2))
    _, s = add_layer_norm(x, residual, eps=EPS)
    ds = torch.randn(3, 24)
    s.backward(ds)
    assert torch.equal(x.grad, ds) and torch.equal(residual.grad, ds)
    assert x.grad.data_ptr() != residual.grad.data_ptr()


def test_autocast_changes_nothing():
    x, weight = torch.randn(5, 24).to(BF16), torch.randn(24)
    expected = layer_norm(x, weight, eps=EPS)
    with torch.autocast("cpu", dtype=BF16):
        y = layer_norm(x, weight, eps=EPS)
    assert y.dtype == BF16 and torch.equal(y, expected)


def test_meta_tensors_have_the_right_shapes():
    x = torch.randn(2, 5, 24, device="meta", dtype=BF16, requires_grad=True)
    weight, bias = (torch.randn(24, device="meta", requires_grad=True) for _ in range(2))
    y, s = add_layer_norm(x, x.detach(), weight, bias, eps=EPS)
    assert (y.shape, y.dtype, s.shape, s.dtype) == (x.shape, BF16, x.shape, BF16)
    (y.sum() + s.sum()).backward()
    assert x.grad.shape == x.shape and weight.grad.dtype == bias.grad.dtype == FP32


def test_vmap_and_grad_of_torch_func():
    x, weight, bias = torch.randn(5, 24), torch.randn(24), torch.randn(24)
    batched = torch.vmap(lambda row: layer_norm(row, weight, bias, eps=EPS))(x)
    assert torch.allclose(batched, layer_norm(x, weight, bias, eps=EPS), atol=1e-6)
    gradient = torch.func.grad(lambda w: add_layer_norm(x, x, w, eps=EPS)[0].square().sum())(weight)
    weight.requires_grad_()
    add_layer_norm(x, x, weight, eps=EPS)[0].square().sum().backward()
    assert torch.allclose(gradient, weight.grad, atol=1e-5)


def test_compiles_the_addition_without_graph_breaks():
    leaves = [torch.randn(5, 24), torch.randn(5, 24), torch.randn(24), torch.randn(24)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def function(*tensors):
        y, s = add_layer_norm(*tensors, eps=EPS)
        return y.square().sum() + s.sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(function(*leaves), leaves)
    assert all(map(torch.equal, torch.autograd.grad(compiled(*leaves), leaves), expected))


def test_backward_runs_on_the_backend_of_the_forward():
    x = torch.randn(5, 24, requires_grad=True)
    with fasttune.use_backend("reference"):
        y = layer_norm(x, eps=EPS)
    with fasttune.use_backend("cuda"):  # would raise if it were asked again
        y.sum().backward()
    assert y.grad_fn.backend.name == "reference" and x.grad is not None

"""rms_norm beyond conformance: transformers' bits, two ulp, arguments, the dispatcher, saving."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import fasttune
from fasttune import _native
from fasttune.ops import add_rms_norm, rms_norm
from fasttune.ops._rms_norm_backends import ADD_FORWARD, BACKWARD, FORWARD
from fasttune.testing.accounting import count
from fasttune.testing.conformance import backend

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-6
BUILDS = [f"cpu:{isa}" for isa in _native.cpu().isa_available().split(",")]
KERNELS = [*BUILDS, "triton"]

STOCK = {
    "llama": (LlamaRMSNorm, {"round_first": True}),
    "qwen3": (Qwen3RMSNorm, {"round_first": True}),
    "gemma": (GemmaRMSNorm, {"weight_offset": 1.0}),
    "gemma3": (Gemma3RMSNorm, {"weight_offset": 1.0}),
    "olmo2": (Olmo2RMSNorm, {}),
    "gpt-oss": (GptOssRMSNorm, {}),
}


@pytest.mark.parametrize("weight_dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("family", sorted(STOCK))
def test_reference_gives_the_bits_of_transformers(family, dtype, weight_dtype):
    make, options = STOCK[family]
    module = make(320, EPS).to(weight_dtype)
    torch.nn.init.normal_(module.weight)
    x = (3 * torch.randn(2, 37, 320)).to(dtype)
    with fasttune.use_backend("reference"):
        y = rms_norm(x, module.weight, eps=EPS, **options)
    expected = module(x)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)


@pytest.mark.parametrize("features", [1, 33, 64, 576, 4096, 16384])
@pytest.mark.parametrize("name", ["reference", *KERNELS])
def test_fp32_results_are_within_two_ulp_of_the_truth(name, features):
    """Elementwise, with ulp = eps |truth|. Roundings of half an ulp each: the mean square (halved
    by the root), the reciprocal root and two products make 2 in C++, where the root is taken in
    fp64; the root and the reciprocal apart make 2.5. So two backends differ by up to 4.5, and
    transformers' own formula, which the reference is bit for bit, is 2.2 off on this data.
    """
    x, weight = torch.randn(24, features), torch.randn(features)
    bound = (2.0 if name in BUILDS else 2.5) * torch.finfo(FP32).eps
    for options in ({}, {"weight_offset": 0.5}, {"round_first": True}):
        truth = rms_norm(x.double(), weight.double(), eps=EPS, **options)
        with backend(name):
            y = rms_norm(x, weight, eps=EPS, **options)
        # The sum of offset and weight is rounded too: relative to the larger of the two.
        size = truth.abs()
        if options.get("weight_offset"):
            size = size + (truth / (0.5 + weight.double())).abs() * 0.5
        assert bool(((y.double() - truth).abs() <= bound * size).all())


@pytest.mark.parametrize("name", KERNELS)
def test_rounding_happens_where_it_should_in_16_bits(name):
    """Everything but the order of the sum is determined, so at most ties turn out differently."""
    x, weight = torch.randn(64, 512).to(BF16), torch.randn(512).to(BF16)
    for options in ({"round_first": True}, {"round_first": False}):
        with fasttune.use_backend("reference"):
            expected = rms_norm(x, weight, eps=EPS, **options)
        with backend(name):
            y = rms_norm(x, weight, eps=EPS, **options)
        # An error of one fp32 ulp moves one value in 2^16 across a tie of bf16.
        assert int((y != expected).sum()) <= 32768 * 2**-16 * 8
    once, twice = (rms_norm(x, weight, eps=EPS, round_first=flag) for flag in (False, True))
    assert int((once != twice).sum()) > 1000


@pytest.mark.parametrize("name", BUILDS)
def test_a_row_does_not_depend_on_its_neighbours_or_the_threads(name):
    before = torch.get_num_threads()
    x, weight = torch.randn(203, 300).to(BF16), torch.randn(300)
    dy = torch.randn(203, 300)
    facts = {"eps": EPS, "weight_offset": 0.0, "round_first": False, "out_dtype": FP32}
    needs = {"weight_offset": 0.0, "need_dx": True, "need_dweight": True}

    def run(rows):
        y, rstd = _native.rms_norm_forward(x[rows], weight, **facts)
        return y, *_native.rms_norm_backward(dy[rows], x[rows], weight, rstd, None, **needs)

    try:
        with backend(name):
            torch.set_num_threads(1)
            y, dx, dweight = run(slice(None))
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                assert all(map(torch.equal, run(slice(None)), (y, dx, dweight)))
            for row in (0, 3, 202):
                alone = run(slice(row, row + 1))
                assert torch.equal(alone[0][0], y[row]) and torch.equal(alone[1][0], dx[row])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_nan_and_infinity_stay_in_their_row(name):
    x = torch.randn(6, 40)
    x[1, 3], x[4, 7] = torch.nan, torch.inf
    with backend(name):
        y = rms_norm(x, torch.ones(40), eps=EPS)
    assert y[1].isnan().all() and y[4, 7].isnan()
    assert torch.equal(y[4, :7], torch.zeros(7))
    assert y[[0, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.ones(5, 24).int()}, TypeError, "x: expected fp32, bf16, fp16 or fp64"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least one dimension"),
        ({"weight": torch.ones(23)}, ValueError, r"weight: expected shape \[24\], got \[23\]"),
        ({"weight": torch.ones(1, 24)}, ValueError, r"weight: expected shape \[24\]"),
        ({"weight": torch.ones(24).int()}, TypeError, "weight: expected fp32"),
        (
            {"weight": torch.ones(24, device="meta")},
            ValueError,
            "weight: expected device cpu as x, got meta",
        ),
        ({"eps": None}, TypeError, "eps: expected a number, got NoneType"),
        (
            {"residual": torch.ones(24)},
            ValueError,
            r"residual: expected shape \[5, 24\], got \[24\]",
        ),
        ({"residual": None}, TypeError, "residual: expected a tensor, got NoneType"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    given = {"x": torch.randn(5, 24), "weight": torch.randn(24), "eps": EPS, **change}
    with pytest.raises(error, match=message):
        (add_rms_norm if "residual" in change else rms_norm)(**given)


def test_longer_rows_than_a_program_holds_give_a_reason():
    args = (torch.randn(2, 16385), None, EPS, 0.0, False, FP32)
    assert "up to 16384 features, got 16385" in FORWARD.reasons(*args)["triton"]
    assert FORWARD.reasons(*args)["cpu"] is None


def test_opcheck():
    x, residual = torch.randn(5, 24), torch.randn(5, 24)
    weight = torch.randn(24)
    facts = (EPS, 1.0, False, FP32)
    opcheck(FORWARD.registered, (x, weight, *facts))
    opcheck(FORWARD.registered, (x, None, *facts))
    opcheck(ADD_FORWARD.registered, (x, residual, weight, *facts))
    dy, rstd = FORWARD.registered(x, weight, *facts)
    opcheck(BACKWARD.registered, (dy, x, weight, rstd, residual, 1.0, True, True))
    opcheck(BACKWARD.registered, (dy, x, None, rstd, None, 1.0, False, True))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0, 3)])
def test_outputs_own_their_memory_and_can_be_changed_in_place(lead):
    x = torch.randn(*lead, 24, requires_grad=True)
    for outputs in ((rms_norm(x, eps=EPS),), add_rms_norm(x, x.detach(), eps=EPS)):
        for y in outputs:
            assert not y._is_view()
            y *= 2
        sum(y.sum() for y in outputs[-1:]).backward()
    expected = torch.full_like(x, 2.0)  # of s, whose gradient arrives alone
    (got,) = torch.autograd.grad((add_rms_norm(x, x.detach(), eps=EPS)[1] * 2).sum(), x)
    assert torch.equal(got, expected)


def test_a_change_of_the_returned_sum_is_noticed():
    """s is saved: normalising its changed value in the backward would be silently wrong."""
    x = torch.randn(3, 24, requires_grad=True)
    y, s = add_rms_norm(x, torch.randn(3, 24), eps=EPS)
    s += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_sum_adds_its_gradient_in_one_rounding():
    x, residual, weight = torch.randn(40, 64).to(BF16), torch.randn(40, 64), torch.randn(64)
    leaves = [x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_()]
    y, s = add_rms_norm(*leaves, eps=EPS)
    dy, ds = torch.randn_like(y), torch.randn_like(s)
    dx, dresidual, _ = torch.autograd.grad([y, s], leaves, [dy, ds])
    assert dx.dtype == BF16 and dresidual.dtype == FP32
    wide = s.detach().double().requires_grad_()
    exact = rms_norm(wide, weight.detach().double(), eps=EPS)
    (norm,) = torch.autograd.grad(exact, wide, dy.double())
    ties = (dx.double() - (norm + ds.double()).to(BF16).double()).abs() > 0
    assert int(ties.sum()) <= 2  # of 2560, one rounding of nearly the same fp32 values
    assert torch.equal(dx.float(), dresidual)


def test_only_needed_gradients_are_computed(monkeypatch):
    seen = []
    original = _native.rms_norm_backward
    monkeypatch.setattr(
        _native, "rms_norm_backward", lambda *a, **k: seen.append(k) or original(*a, **k)
    )
    for train_x, train_weight in ((True, False), (False, True), (True, True)):
        x = torch.randn(5, 24, requires_grad=train_x)
        weight = torch.randn(24, requires_grad=train_weight)
        rms_norm(x, weight, eps=EPS).sum().backward()
        assert (seen[-1]["need_dx"], seen[-1]["need_dweight"]) == (train_x, train_weight)
        assert (x.grad is not None, weight.grad is not None) == (train_x, train_weight)
    frozen = rms_norm(torch.randn(5, 24), torch.randn(24), eps=EPS)
    assert frozen.grad_fn is None


def test_saves_x_as_it_came_and_one_number_a_row():
    weight = torch.nn.Parameter(torch.randn(64))
    x = torch.randn(2, 9, 64, dtype=BF16)

    def norm(x):
        return rms_norm(x * 1, weight, eps=EPS, round_first=True)

    counts = count(norm, x.requires_grad_())
    assert counts.saved_bytes == x.numel() * 2 + 18 * 4
    assert counts.total.opaque.calls == 0
    assert [launch.name for launch in counts.backward.launches if "fasttune" in launch.name] == [
        "fasttune::rms_norm_backward",
        "fasttune::rms_norm_backward.dweight",
    ]
    y = norm(x)
    assert y.grad_fn.saved_bytes == x.numel() * 2 + 18 * 4


def test_shows_in_profiles_and_dispatch_modes():
    from torch.profiler import profile
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(5, 24, requires_grad=True)
    with Log():
        rms_norm(x, eps=EPS).sum().backward()
        sum(t.sum() for t in add_rms_norm(x, x, eps=EPS)).backward()
    expected = {"rms_norm_fwd", "add_rms_norm_fwd", "rms_norm_bwd"}
    assert {f"fasttune.{name}.default" for name in expected} <= set(seen)
    with profile() as recorded:
        rms_norm(x, eps=EPS)
    assert "fasttune::rms_norm_fwd" in {event.key for event in recorded.key_averages()}


def test_meta_tensors_have_the_right_shapes():
    x = torch.randn(2, 5, 24, device="meta", dtype=BF16, requires_grad=True)
    weight = torch.randn(24, device="meta", requires_grad=True)
    y, s = add_rms_norm(x, x.detach(), weight, eps=EPS, round_first=True)
    assert (y.shape, y.dtype, s.shape, s.dtype) == (x.shape, FP32, x.shape, BF16)
    (y.sum() + s.sum()).backward()
    assert x.grad.shape == x.shape and weight.grad.dtype == FP32


def test_vmap_and_grad_of_torch_func():
    x, weight = torch.randn(5, 24), torch.randn(24)
    batched = torch.vmap(lambda row: rms_norm(row, weight, eps=EPS))(x)
    assert torch.allclose(batched, rms_norm(x, weight, eps=EPS), atol=1e-6)
    gradient = torch.func.grad(lambda w: add_rms_norm(x, x, w, eps=EPS)[0].square().sum())(weight)
    weight.requires_grad_()
    add_rms_norm(x, x, weight, eps=EPS)[0].square().sum().backward()
    assert torch.allclose(gradient, weight.grad, atol=1e-5)


def test_compiles_the_addition_without_graph_breaks():
    x, residual = torch.randn(5, 24, requires_grad=True), torch.randn(5, 24, requires_grad=True)
    weight = torch.randn(24, requires_grad=True)
    leaves = [x, residual, weight]

    def function(*tensors):
        y, s = add_rms_norm(*tensors, eps=EPS)
        return y.square().sum() + s.sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(function(*leaves), leaves)
    assert all(map(torch.equal, torch.autograd.grad(compiled(*leaves), leaves), expected))


def test_second_derivatives_raise():
    x = torch.randn(5, 24, requires_grad=True)
    (gradient,) = torch.autograd.grad(rms_norm(x, eps=EPS).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_backward_runs_on_the_backend_of_the_forward():
    x = torch.randn(5, 24, requires_grad=True)
    with fasttune.use_backend("reference"):
        y = rms_norm(x, eps=EPS)
    assert y.grad_fn.backend.name == "reference"
    with fasttune.use_backend("cuda"):  # would raise if it were asked again
        y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_weights_that_are_not_contiguous(dtype, offset):
    x, table = torch.randn(9, 300), torch.randn(300, 3).to(dtype)
    weight = table[:, 1].requires_grad_()
    y = rms_norm(x, weight, eps=EPS, weight_offset=offset)
    assert torch.equal(y, rms_norm(x, weight.contiguous(), eps=EPS, weight_offset=offset))
    y.sum().backward()
    assert weight.grad.shape == (300,)


def test_transposed_and_expanded_inputs():
    weight = torch.randn(6)
    for x in (torch.randn(6, 8).t(), torch.randn(1, 6).expand(8, 6), torch.randn(6).expand(8, 6)):
        expected = rms_norm(x.contiguous(), weight, eps=EPS)
        assert torch.equal(rms_norm(x, weight, eps=EPS), expected)
        y, s = add_rms_norm(x, x, weight, eps=EPS)
        assert torch.equal(s, x + x) and y.is_contiguous()

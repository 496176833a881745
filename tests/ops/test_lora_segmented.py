"""lora_segmented beyond conformance: assignments, base rows, rows without an adapter, arguments."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.nn.functional import linear

import fasttune
from fasttune.ops import LoraBranch, lora_linear, lora_segmented, rms_norm
from fasttune.ops._lora_segmented_backends import BACKWARD, FORWARD
from fasttune.ops._lora_segmented_plan import MAX_SEGMENTS, plan

K, N = 48, 40


def branch(rank, *, dtype=torch.float32, p=0.0, bias=False, scaling=0.5):
    a = (torch.randn(rank, K) * K**-0.5).to(dtype).requires_grad_()
    b = (torch.randn(N, rank) * rank**-0.5).to(dtype).requires_grad_()
    return LoraBranch(a, b, scaling, torch.randn(N).requires_grad_() if bias else None, p)


def arguments(*lead, dtype=torch.float32, ranks=(4, 8, 16), **changes):
    x = torch.randn(*lead, K).to(dtype).requires_grad_()
    weight = (torch.randn(N, K) * K**-0.5).to(dtype)
    return x, weight, [branch(rank, **changes) for rank in ranks]


def leaves_of(branches):
    return [t for each in branches for t in (each.a, each.b, each.bias) if t is not None]


@pytest.mark.parametrize("rows_of", [[0, 1, 2, 1], [2, -1, 0, 0], [-1, 1, -1, 1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_batch_equals_separate_calls(rows_of, dtype):
    x, weight, branches = arguments(4, 6, dtype=dtype, bias=True)
    dy = torch.randn(4, 6, N).to(dtype)
    y = lora_segmented(x, weight, branches, rows_of)
    used = sorted({j for j in rows_of if j >= 0})
    leaves = leaves_of([branches[j] for j in used])
    dx, *grads = torch.autograd.grad(y, [x, *leaves], dy)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for j, given in [*((j, branches[j]) for j in used), (-1, None)]:
        places = [i for i, owner in enumerate(rows_of) if owner == j]
        if not places:
            continue
        own = x.detach()[places].requires_grad_()
        if given is None:
            apart, wanted = linear(own, weight), [own]
        else:
            apart = lora_linear(own, weight, given.a, given.b, scaling=0.5, lora_bias=given.bias)
            wanted = [own, *leaves_of([given])]
        assert torch.allclose(y[places], apart, atol=tolerance, rtol=tolerance)
        own_dx, *own_grads = torch.autograd.grad(apart, wanted, dy[places])
        assert torch.allclose(dx[places], own_dx, atol=tolerance, rtol=tolerance)
        first = 3 * used.index(j) if given is not None else 0
        for ours, theirs in zip(grads[first : first + 3], own_grads, strict=False):
            assert ours.dtype == torch.float32  # the adapter's, never rounded on the way
            assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [20, 3 * MAX_SEGMENTS])
@pytest.mark.parametrize("has_bias", [False, True])
def test_base_rows_have_the_bits_of_the_base_product(dtype, rows, has_bias):
    x, weight, branches = arguments(rows, dtype=dtype)
    bias = torch.randn(N).to(dtype) if has_bias else None
    rows_of = [i % 4 - 1 for i in range(rows)]
    y = lora_segmented(x, weight, branches, rows_of, bias=bias)
    base = torch.tensor(rows_of) == -1
    assert torch.equal(y[base], linear(x, weight, bias)[base])
    assert not torch.equal(y[~base], linear(x, weight, bias)[~base])


def test_the_order_of_rows_does_not_matter():
    """Runs, single rows and gathered rows are the same function."""
    rows = 4 * MAX_SEGMENTS
    x, weight, branches = arguments(rows)
    sorted_rows = torch.arange(rows) * 4 // rows - 1
    shuffle = torch.randperm(rows)
    dy = torch.randn(rows, N)
    leaves = [x, *leaves_of(branches)]
    y = lora_segmented(x, weight, branches, sorted_rows)
    mixed = lora_segmented(x[shuffle], weight, branches, sorted_rows[shuffle])
    assert plan(sorted_rows.tolist(), rows).order is None
    assert plan(sorted_rows[shuffle].tolist(), rows).order is not None
    assert torch.allclose(mixed, y[shuffle], atol=1e-5)
    expected = torch.autograd.grad(y, leaves, dy)
    for ours, theirs in zip(torch.autograd.grad(mixed, leaves, dy[shuffle]), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_samples_and_rows_are_two_ways_to_say_it():
    x, weight, branches = arguments(3, 5, p=0.2)
    seed = torch.tensor(7)
    by_sample = lora_segmented(x, weight, branches, [2, -1, 0], seed=seed)
    by_row = [2] * 5 + [-1] * 5 + [0] * 5
    assert torch.equal(lora_segmented(x, weight, branches, by_row, seed=seed), by_sample)
    tensor = torch.tensor(by_row).view(3, 5)
    assert torch.equal(lora_segmented(x, weight, branches, tensor, seed=seed), by_sample)


def test_one_branch_for_all_rows_is_lora_linear_bit_for_bit():
    x, weight, (first, *_) = arguments(3, 5, p=0.3)
    seed = torch.tensor(11)
    y = lora_segmented(x, weight, [first], [0, 0, 0], seed=seed)
    expected = lora_linear(x, weight, first.a, first.b, scaling=0.5, dropout_p=0.3, seed=seed)
    assert torch.equal(y, expected)
    leaves = [x, first.a, first.b]
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_a_branch_without_rows_gets_no_gradient_and_weight_decay_leaves_it():
    x, weight, branches = arguments(4)
    before = [leaf.detach().clone() for leaf in leaves_of(branches)]
    optimizer = torch.optim.AdamW(leaves_of(branches), lr=0.1, weight_decay=0.5)
    lora_segmented(x, weight, branches, [0, -1, 2, 0]).sum().backward()
    assert branches[1].a.grad is None and branches[1].b.grad is None
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(leaves_of(branches), before, strict=True)]
    assert moved == [True, True, False, False, True, True]


@pytest.mark.parametrize("rows_of", [[-1, -1], []], ids=["base-only", "empty"])
def test_batches_without_any_adapter(rows_of):
    x, weight, branches = arguments(len(rows_of), 3)
    y = lora_segmented(x, weight.requires_grad_(), branches, rows_of)
    assert torch.equal(y, linear(x, weight))
    y.sum().backward()
    assert all(leaf.grad is None for leaf in leaves_of(branches))
    assert torch.allclose(x.grad, weight.sum(0).expand_as(x), atol=1e-6)


def test_one_vector():
    x, weight, branches = arguments()
    y = lora_segmented(x, weight, branches, [1])
    expected = lora_linear(x, weight, branches[1].a, branches[1].b, scaling=0.5)
    assert torch.allclose(y, expected, atol=1e-6)


def test_adapters_of_several_dtypes():
    x, weight, _ = arguments(2)
    branches = [branch(4, dtype=torch.bfloat16), branch(8)]
    y = lora_segmented(x, weight, branches, [0, 1])
    y.sum().backward()
    assert [each.a.grad.dtype for each in branches] == [torch.bfloat16, torch.float32]


def test_gradients_of_16_bit_factors_are_summed_over_segments_in_fp32():
    """Many segments of one branch: rounding each part to bf16 would be seen."""
    x, weight, (first,) = arguments(31, 4, ranks=(8,), dtype=torch.bfloat16)
    factors = [f.detach().bfloat16().requires_grad_() for f in (first.a, first.b)]
    given = LoraBranch(*factors, 0.5)
    dy = torch.randn(31, 4, N).bfloat16()
    rows_of = [0 if i % 2 == 0 else -1 for i in range(31)]
    y = lora_segmented(x, weight, [given], rows_of)
    grads = torch.autograd.grad(y, factors, dy)
    exact = [f.detach().double().requires_grad_() for f in factors]
    x64, dy64 = x.detach().double()[::2], dy.double()[::2]
    truth = torch.autograd.grad(x64 @ exact[0].t() @ exact[1].t() * 0.5, exact, dy64)
    for ours, theirs in zip(grads, truth, strict=True):
        error = (ours.double() - theirs).abs()
        assert (error <= theirs.abs() * 2**-8 * 1.01 + 1e-5).all()  # one rounding to bf16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows_of": [0, 1]}, ValueError, r"rows_of: expected 4 \(samples\) or 12 \(rows\) .* 2"),
        ({"rows_of": [0, 1, 3, 0]}, ValueError, "rows_of: expected -1 or a branch below 3, got 3"),
        ({"rows_of": [0, 1, -2, 0]}, ValueError, "rows_of: .* got -2"),
        ({"rows_of": torch.ones(4)}, TypeError, "rows_of: expected integers, got torch.float32"),
        ({"rows_of": ["de"] * 4}, TypeError, "rows_of: expected integers, got str"),
        ({"weight": torch.ones(N, K - 1)}, ValueError, r"weight: expected shape \[any, 48\]"),
        ({"bias": torch.ones(N + 1)}, ValueError, r"bias: expected shape \[40\]"),
        ({"seed": torch.tensor([1])}, ValueError, "seed: expected a 0-d int64 tensor"),
        (
            {"branches": [LoraBranch(torch.ones(2, K), torch.ones(N, 3))]},
            ValueError,
            r"b: expected shape \[40, 2\]",
        ),
        (
            {"branches": [LoraBranch(torch.ones(2, K), torch.ones(N, 2), dropout_p=1.0)]},
            ValueError,
            "dropout_p: expected a probability",
        ),
        (
            {
                "branches": [
                    LoraBranch(torch.ones(2, K), torch.ones(N, 2), rank_scale=torch.ones(2))
                ]
            },
            ValueError,
            "branches: expected no rank_scale",
        ),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    x, weight, branches = arguments(4, 3)
    given = {"x": x, "weight": weight, "branches": branches, "rows_of": [0, 1, 2, 0], **change}
    with pytest.raises(error, match=message):
        lora_segmented(**given)


def test_the_registered_ops_pass_opcheck():
    x, weight, branches = arguments(6)
    a, b = [f.a.detach() for f in branches[:2]], [f.b.detach() for f in branches[:2]]
    none, scales, zeros = [None, None], [0.5, 2.0], [0, 0]
    segments = [0, 2, 1, 3, 6, 0]
    facts = (none, scales, zeros, [0, 1], segments, None, None)
    args = (x.detach(), weight, None, a, b, none, *facts, torch.float32)
    opcheck(FORWARD.registered, args, test_utils=("test_schema", "test_faketensor"))
    _, ts = FORWARD.registered(*args)
    needs = [True, False, False, True, True, True, True, False, False]
    dy = torch.randn(6, N)
    back = (dy, x.detach(), weight, a, b, ts, *facts, torch.float32, needs)
    opcheck(BACKWARD.registered, back, test_utils=("test_schema", "test_faketensor"))


def test_saved_for_backward_is_the_input_and_t_only():
    x, weight, branches = arguments(4, 6)
    y = lora_segmented(x, weight, branches, [0, -1, 1, 1])
    assert y.grad_fn.saved_bytes == 4 * (24 * K + 6 * 4 + 12 * 8)
    for each in branches:
        each.a.requires_grad_(False)
    y = lora_segmented(x, weight, branches, [0, -1, 1, 1])
    assert y.grad_fn.saved_bytes == 4 * (6 * 4 + 12 * 8)


@pytest.mark.parametrize(
    ("rows_of", "t_floats"),
    [([0, -1, 1, 1], 60 * (4 + 8 + 8)), ([i % 3 for i in range(240)], 80 * (4 + 8 + 16))],
    ids=["segments", "gathered"],
)
def test_the_output_of_a_norm_is_rebuilt_and_not_saved(rows_of, t_floats):
    x, weight, branches = arguments(4, 60)
    gain = torch.rand(K).requires_grad_()
    results = []
    for detached in (False, True):
        h = rms_norm(x, gain, eps=1e-6)
        if detached:
            h = h.detach().requires_grad_()
        y = lora_segmented(h, weight, branches, rows_of)
        results.append(torch.autograd.grad(y.square().sum(), leaves_of(branches[:2])))
        assert y.grad_fn.saved_bytes == 4 * (t_floats + (x.numel() if detached else 0))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rows_of", [[0, 1, 2], [2, -1, 0]], ids=str)
def test_the_base_product_runs_once_whatever_the_number_of_adapters(rows_of):
    x, weight, branches = arguments(3, 5)
    with fasttune.use_backend("cpu"), torch.autograd.profiler.profile() as profile:
        lora_segmented(x, weight, branches, rows_of).sum().backward()
    products = ("aten::mm", "aten::addmm", "aten::addmm_")
    assert sum(event.count for event in profile.key_averages() if event.key in products) == 2


def test_inside_torch_func():
    x, weight, branches = arguments(4)
    x = x.detach()

    def loss(x):
        return lora_segmented(x, weight, branches, [0, -1, 1, 2]).sum()

    expected = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    assert torch.allclose(torch.func.grad(loss)(x.detach()), expected, atol=1e-5)

"""linear_cross_entropy beyond conformance: statistics, arguments, chunks, the dispatcher."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.nn.functional import cross_entropy

from fasttune.ops import CrossEntropy, LoraBranch, linear_cross_entropy
from fasttune.ops._chunked_head import chunk_rows, logits_buffer
from fasttune.ops.linear_cross_entropy import FORWARD


def arguments(m=20, h=16, v=101):
    hidden = torch.randn(m, h, requires_grad=True)
    targets = torch.randint(0, v, (m,))
    targets[::5] = -100
    return hidden, torch.randn(v, h), targets


def test_statistics_without_logits():
    hidden, weight, targets = arguments()
    loss, stats = linear_cross_entropy(hidden, weight, targets, return_stats=True)
    valid = targets != -100
    logits = (hidden @ weight.t())[valid]
    assert torch.allclose(loss, cross_entropy(logits, targets[valid]))
    assert torch.allclose(stats.accuracy, (logits.argmax(-1) == targets[valid]).float().mean())
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert torch.allclose(stats.entropy, entropy, rtol=1e-5)
    assert int(stats.tokens) == int(valid.sum())
    assert not stats.accuracy.requires_grad


def test_the_lowest_index_wins_a_tie():
    hidden, weight = torch.ones(2, 4), torch.ones(6, 4)
    _, stats = linear_cross_entropy(hidden, weight, torch.tensor([0, 3]), return_stats=True)
    assert float(stats.accuracy) == 0.5


def test_all_rows_ignored_is_nan_as_torch():
    hidden, weight, targets = arguments()
    targets[:] = -100
    loss = linear_cross_entropy(hidden, weight, targets)
    assert torch.isnan(loss)
    assert float(linear_cross_entropy(hidden, weight, targets, reduction="sum")) == 0.0


def test_no_rows():
    hidden, weight, targets = arguments(m=0)
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum")
    loss.backward()
    assert float(loss) == 0.0 and hidden.grad.shape == (0, 16)


def test_nan_and_infinity_are_not_hidden():
    hidden, weight, targets = arguments()
    with torch.no_grad():
        hidden[1] = float("nan")
    assert torch.isnan(linear_cross_entropy(hidden, weight, targets))


def test_large_logits_do_not_overflow():
    hidden, weight, targets = arguments()
    loss = linear_cross_entropy(hidden * 1e4, weight, targets)
    assert torch.allclose(loss, cross_entropy(hidden * 1e4 @ weight.t(), targets), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"targets": torch.zeros(20)},
            TypeError,
            "targets: expected an int64 tensor, got torch.float32",
        ),
        (
            {"targets": torch.zeros(19, dtype=torch.int64)},
            ValueError,
            r"targets: expected shape \[20\], got \[19\]",
        ),
        (
            {"targets": torch.full((20,), 101)},
            ValueError,
            r"targets: expected values in \[0, 101\).* got 101",
        ),
        ({"targets": torch.full((20,), -1)}, ValueError, "got -1"),
        ({"weight": torch.ones(101, 15)}, ValueError, "weight: expected shape"),
        ({"weight": torch.ones(101, 16).half()}, TypeError, "weight: expected hidden's dtype"),
        ({"bias": torch.ones(7)}, ValueError, "bias: expected shape"),
        ({"reduction": "none"}, ValueError, "reduction: expected 'mean' or 'sum', got 'none'"),
        (
            {"branches": [LoraBranch(torch.ones(2, 16), torch.ones(100, 2))]},
            ValueError,
            "b: expected shape",
        ),
        (
            {
                "branches": [
                    LoraBranch(torch.ones(2, 16), torch.ones(101, 2), out_scale=torch.ones(101))
                ]
            },
            ValueError,
            "branches: expected no rank_scale and no out_scale",
        ),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    hidden, weight, targets = arguments()
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "targets": targets, **change})


def test_chunks_fit_the_budget():
    assert chunk_rows(10_000, 576, 49_152, 2, "cpu") * 49_152 * 2 <= 64 << 20
    assert chunk_rows(10_000, 576, 49_152, 2, "cpu") % 64 == 0
    assert (
        chunk_rows(10_000, 576, 300_000, 4, "cpu") == 64
    )  # never less, however wide the vocabulary
    # Where the head is wide, a chunk is not so small that reading the head again takes its time.
    assert chunk_rows(128, 4096, 128_256, 2, "cpu") == 128
    assert chunk_rows(8192, 4096, 128_256, 2, "cpu") == 256
    assert chunk_rows(7, 576, 49_152, 2, "cpu") == 7
    assert chunk_rows(0, 576, 49_152, 2, "cpu") == 1


def test_incoming_gradient_scales_and_the_graph_can_be_kept():
    hidden, weight, targets = arguments()
    loss = linear_cross_entropy(hidden, weight, targets)
    (once,) = torch.autograd.grad(3 * loss, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(loss, hidden)
    assert torch.allclose(once, 3 * again)


def test_fp16_with_a_large_loss_scale_does_not_underflow():
    hidden, weight, targets = arguments(m=4000)
    half = hidden.detach().half().requires_grad_()
    (65536 * linear_cross_entropy(half, weight.half(), targets)).backward()
    (65536 * cross_entropy(hidden @ weight.t(), targets)).backward()
    error = (half.grad.float() - hidden.grad).norm() / hidden.grad.norm()
    assert float(error) < 5e-3


def test_opcheck():
    hidden, weight, targets = arguments()
    a, b = torch.randn(3, 16), torch.randn(101, 3)
    needs = [True, True, False, True, True]
    options = [-100.0, 1.0, 0.0, 0.0, 0.0]
    args = (
        hidden.detach(),
        weight,
        None,
        targets,
        [a],
        [b],
        [None],
        [1.0],
        [0],
        None,
        torch.float32,
        options,
        True,
        needs,
    )
    opcheck(FORWARD.registered, args)


def test_torch_func():
    hidden, weight, targets = arguments()
    gradient = torch.func.grad(lambda h: linear_cross_entropy(h, weight, targets))(hidden.detach())
    linear_cross_entropy(hidden, weight, targets).backward()
    assert torch.allclose(gradient, hidden.grad, atol=1e-6)


def test_double_backward_raises():
    hidden, weight, targets = arguments()
    loss = linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_row_loss_is_replaceable_by_data():
    hidden, weight, targets = arguments()
    smooth = CrossEntropy(label_smoothing=0.3)
    expected = cross_entropy(hidden @ weight.t(), targets, label_smoothing=0.3)
    assert torch.allclose(
        linear_cross_entropy(hidden, weight, targets, row_loss=smooth), expected, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1000, 1024, 49152])
def test_rows_of_logits_on_a_cpu_do_not_share_the_same_sets_of_the_cache(vocab, dtype):
    logits = logits_buffer(8, vocab, dtype, torch.device("cpu"))
    assert logits.shape == (8, vocab) and logits.stride(1) == 1
    assert logits.stride(0) * dtype.itemsize % 2048 != 0
    assert logits.stride(0) == vocab or vocab * dtype.itemsize % 2048 == 0


def test_what_lies_between_rows_of_logits_is_not_read():
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 64).bfloat16(), torch.randn(2048, 64).bfloat16()
    targets = torch.randint(0, 2048, (70,))
    room = logits_buffer(128, 2048, torch.bfloat16, hidden.device)
    room.as_strided((128 * room.stride(0) - 32,), (1,)).fill_(torch.nan)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    exact = hidden.detach().double().requires_grad_()
    truth = cross_entropy(exact @ weight.double().t(), targets)
    truth.backward()
    assert abs(loss.item() - truth.item()) <= 1e-2 * truth.item()
    assert (hidden.grad - exact.grad).norm() <= 1e-2 * exact.grad.norm()


@pytest.mark.parametrize("vocab", [100, 1024])
@pytest.mark.parametrize("place", ["bias", "hidden"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e30])
def test_what_is_not_finite_is_where_torch_has_it(value, place, vocab):
    hidden, weight, targets = torch.randn(6, 16), torch.randn(vocab, 16), torch.arange(6)
    bias = torch.zeros(vocab)
    {"bias": bias[3], "hidden": hidden[2, 5]}[place].fill_(value)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = linear_cross_entropy(ours, weight, targets, bias=bias)
    stock = cross_entropy(theirs @ weight.t() + bias, targets)
    loss.backward()
    stock.backward()
    assert loss.isfinite() == stock.isfinite()
    assert torch.equal(ours.grad.isfinite(), theirs.grad.isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_alike_on_any_number_of_threads(dtype):
    hidden = (4 * torch.randn(70, 32)).to(dtype).requires_grad_()
    weight, targets = torch.randn(1003, 32).to(dtype), torch.randint(0, 1003, (70,))
    previous, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 9):
            torch.set_num_threads(count)
            loss = linear_cross_entropy(hidden, weight, targets, reduction="sum")
            runs.append(torch.autograd.grad(loss, hidden)[0])
    finally:
        torch.set_num_threads(previous)
    assert all((run - runs[0]).norm() <= 1e-3 * runs[0].norm() for run in runs[1:])

"""What is special of reft; tests/test_conformance.py has the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fasttune import _native
from fasttune.ops import reft
from fasttune.ops.reft import FORWARD
from fasttune.testing.accounting import count
from fasttune.testing.conformance import backend

ROWS = torch.tensor([14, 0, -1, 7])


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "h": torch.randn(3, 5, 24).to(dtype),
        "rotation": torch.randn(6, 24).to(dtype),
        "source": torch.randn(6, 24).to(dtype),
        "bias": torch.randn(6).to(dtype),
    }


def call(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {**tensors(), "rows": ROWS, **changes}
    leading = [arguments.pop(name) for name in ("h", "rotation", "source", "bias")]
    return reft(*leading, **arguments)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_rows_are_the_same_bits(name: str, dtype: torch.dtype) -> None:
    given = tensors(dtype)
    given["h"][0, 2] = torch.nan  # a masked row may hold anything
    given["h"].requires_grad_()
    with backend(name):
        y = call(**given)
        others = torch.tensor([row for row in range(15) if row not in ROWS])
        assert torch.equal(
            y.view(15, 24)[others].nan_to_num(), given["h"].view(15, 24)[others].nan_to_num()
        )
        dy = torch.randn(y.shape).to(dtype)
        y.backward(dy)
    gradient = given["h"].grad
    assert gradient is not None and torch.equal(
        gradient.view(15, 24)[others], dy.view(15, 24)[others]
    )
    assert gradient.isfinite().all()


def test_a_nan_in_the_first_row_stays_out_of_the_gradients_of_absent_entries() -> None:
    for name in ("reference", "cpu", "triton"):
        given = tensors()
        given["h"][0, 0] = torch.nan
        for tensor in given.values():
            tensor.requires_grad_()
        with backend(name):
            call(**given, rows=torch.tensor([-1, 4, -1])).nan_to_num().sum().backward()
        assert all(tensor.grad.isfinite().all() for tensor in given.values()), name


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_entries_that_name_no_row_give_zeros(name: str) -> None:
    h, rotation, source, bias = tensors().values()
    flat = h.view(15, 24)
    with backend(name):
        run = FORWARD.backends[name].run
        results = run(
            flat, ROWS, rotation, source, bias, True, "sigmoid", 0, None, flat.clone()
        )  # fmt: skip
    for result in results:
        assert (result[2] == 0).all() and (result[[0, 1, 3]] != 0).all()


def test_masks_are_the_same_in_every_backend() -> None:
    seed = torch.tensor(123456789012345)
    outputs = []
    for name in ("reference", "cpu", "triton"):
        with backend(name):
            outputs.append(call(dropout_p=0.5, seed=seed) == 0)
    assert 0.4 < outputs[0].view(15, 24)[ROWS[ROWS >= 0]].float().mean() < 0.6
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_in_place_edits_the_given_memory_and_nothing_else() -> None:
    expected = call()
    h = tensors()["h"]
    y = call(h=h, inplace=True)
    assert y.data_ptr() == h.data_ptr() and torch.equal(y, expected)
    h = tensors()["h"].requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        call(h=h, inplace=True)
    strided = tensors()["h"].transpose(0, 1)
    before = strided.clone()
    call(h=strided, inplace=True)
    assert torch.equal(strided, before)


def test_who_saved_the_edited_tensor_is_told() -> None:
    h = tensors()["h"].requires_grad_().exp()  # exp saves its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        call(h=h, inplace=True).sum().backward()


def test_it_saves_the_listed_rows_only() -> None:
    h = torch.empty(512, 24, device="meta", requires_grad=True)
    rest = [torch.empty(*shape, device="meta") for shape in ((6, 24), (6, 24), (6,))]
    rows = torch.empty(8, dtype=torch.int64, device="meta")
    used = count(lambda h: reft(h, *rest, rows=rows), h).saved_bytes
    assert used <= 8 * (24 + 2 * 6) * 4 + 2 * 6 * 24 * 4 + 8 * 8


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    results = []
    threads = torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        try:
            given = {name: tensor.requires_grad_() for name, tensor in tensors().items()}
            y = call(**given, rows=None)
            y.square().sum().backward()
            results.append([y.detach(), *(tensor.grad for tensor in given.values())])
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttune.testing.cases.reft import CASES
    from fasttune.testing.conformance import run_case

    original = _native.reft_backward

    def off(*args: Any, **kwargs: Any) -> Any:
        g, dz, dd = original(*args, **kwargs)
        return g, dz, dd * 1.001

    monkeypatch.setattr(_native, "reft_backward", off)
    with pytest.raises(AssertionError, match="gradient of rotation: error"):
        run_case(CASES[0], "cpu")


def test_vmap_and_second_derivatives() -> None:
    given = tensors()
    rest = (given["rotation"], given["source"], given["bias"])
    mapped = torch.func.vmap(lambda h: reft(h, *rest, rows=torch.tensor([4, -1, 1])))(given["h"])
    expected = reft(given["h"], *rest, rows=torch.tensor([4, 1, 9, 6, 14, 11]))
    assert torch.allclose(mapped, expected, atol=1e-5)
    h = given["h"].requires_grad_()
    (gradient,) = torch.autograd.grad(call(h=h).square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"h": torch.ones(3, dtype=torch.int64)}, TypeError, "h: expected fp32"),
        ({"h": torch.ones(())}, ValueError, "h: expected at least one dimension"),
        ({"rotation": torch.randn(6, 23)}, ValueError, r"rotation: expected shape \[any, 24\]"),
        ({"source": torch.randn(5, 24)}, ValueError, r"source: expected shape \[6, 24\]"),
        ({"bias": torch.randn(5)}, ValueError, r"bias: expected shape \[6\]"),
        ({"rows": [1]}, TypeError, "rows: expected a tensor, got list"),
        ({"rows": torch.tensor([1], dtype=torch.int32)}, TypeError, "rows: expected int64"),
        ({"rows": torch.tensor([[1]])}, ValueError, r"rows: expected one dimension, got .*1, 1"),
        ({"rows": torch.tensor([15])}, ValueError, "rows: expected numbers below 15, got 15"),
        ({"rows": torch.tensor([1, 1])}, ValueError, "rows: expected each row at most once"),
        ({"activation": "swish"}, ValueError, "activation: expected one of silu"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p: expected a probability"),
    ],
)
def test_wrong_arguments_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**changes)

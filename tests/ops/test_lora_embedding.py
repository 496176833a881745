"""What is special of lora_embedding; tests/test_conformance.py has the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn import functional

from fasttune.ops import LoraBranch, lora_embedding
from fasttune.ops.lora_embedding import BACKWARD, FORWARD
from fasttune.testing import accounting
from fasttune.testing.conformance import backend

BF16, FP32 = torch.bfloat16, torch.float32
VOCABULARY, FEATURES, RANK, TOKENS = 128_000, 4096, 16, 8192


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def stock(base: Tensor, ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """As PEFT has it."""
    return (base + (functional.embedding(ids, a.t()) @ b.t()) * 2.0).to(base.dtype)


def test_the_gradient_of_a_is_the_only_thing_as_large_as_the_vocabulary() -> None:
    a, b = nn.Parameter(meta(RANK, VOCABULARY)), nn.Parameter(meta(FEATURES, RANK))
    base, ids = meta(TOKENS, FEATURES, dtype=BF16), meta(TOKENS, dtype=torch.int64)
    ours = accounting.count(lambda: lora_embedding(base, ids, [LoraBranch(a, b, 2.0)]))
    theirs = accounting.count(lambda: stock(base, ids, a, b))
    assert ours.total.opaque.calls == 0
    # Written as zeros and, for PEFT, read and written again by the transposition.
    large = [launch for launch in ours.total.launches if launch.bytes_written >= a.nbytes]
    assert [launch.name for launch in large if "lora_up" not in launch.name] == ["aten::zeros_like"]
    assert ours.saved_bytes == theirs.saved_bytes
    # base, y and dy once each, the factors, and what the rows of the ids need.
    floor = 3 * base.nbytes + a.nbytes
    assert floor < ours.total.bytes_moved < 1.4 * floor
    assert theirs.total.bytes_moved > 6 * ours.total.bytes_moved


def leaves() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (1500,), generator=generator)
    base, a, b = (
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((1500, 24), (5, 53), (24, 5))
    )
    return base, ids, a, b


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_the_sums_have_one_order(name: str) -> None:
    base, ids, a, b = leaves()
    before, gradients = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            with backend(name):
                y = lora_embedding(base, ids, [LoraBranch(a, b, 0.5)])
                gradients.append(torch.autograd.grad(y.square().sum(), [a, b]))
    finally:
        torch.set_num_threads(before)
    for found in gradients[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found, gradients[0], strict=True))


def test_a_16_bit_factor_is_rounded_once() -> None:
    """256 equal terms of 1: a sum in bf16 would stop growing at 256 and lose what follows."""
    ids = torch.zeros(400, dtype=torch.int64)
    a = torch.zeros(1, 3, dtype=BF16, requires_grad=True)
    b = torch.ones(1, 1, dtype=BF16)
    y = lora_embedding(torch.zeros(400, 1, dtype=BF16), ids, [LoraBranch(a, b)])
    (da,) = torch.autograd.grad(y.sum(), a)
    assert da.tolist() == [[400.0, 0.0, 0.0]]


def test_the_registered_ops_pass_opcheck() -> None:
    base, ids, a, b = (tensor.detach() for tensor in leaves())
    utils = ("test_schema", "test_faketensor")
    args = (base, ids, [torch.tensor(0.5)], [a], [b], [1.0])
    opcheck(FORWARD.registered, args, test_utils=utils)
    _, ts = FORWARD.registered(*args)
    back = (base, *args[1:5], ts, [1.0], 3, [True, True])
    opcheck(BACKWARD.registered, back, test_utils=utils)


def test_inside_torch_func() -> None:
    base, ids, a, b = leaves()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return lora_embedding(base, ids, [LoraBranch(a, b)], padding_idx=3).square().sum()

    expected = torch.autograd.grad(loss(a, b), (a, b))
    found = torch.func.grad(loss, argnums=(0, 1))(a.detach(), b.detach())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not found[0][:, 3].any()


def test_a_second_derivative_raises() -> None:
    base, ids, a, b = leaves()
    y = lora_embedding(base, ids, [LoraBranch(a, b)])
    (da,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        da.sum().backward()


A, B, BASE, IDS = torch.ones(2, 9), torch.ones(4, 2), torch.ones(3, 4), torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"base": [1.0]}, TypeError, "base: expected a tensor, got list"),
        ({"ids": IDS.float()}, TypeError, "ids: expected an int32 or int64 tensor"),
        ({"ids": IDS[:2]}, ValueError, r"ids: expected shape \[3\], got \[2\]"),
        ({"branches": []}, ValueError, "branches: expected at least one, got none"),
        ({"branches": [LoraBranch(A, B.t())]}, ValueError, r"b: expected shape \[4, 2\]"),
        ({"branches": [LoraBranch(A[0], B)]}, ValueError, r"a: expected shape \[any, any\]"),
        (
            {"branches": [LoraBranch(A, B), LoraBranch(A[:, 1:], B)]},
            ValueError,
            r"a: expected shape \[any, 9\], got \[2, 8\]",
        ),
        ({"branches": [LoraBranch(A, B.half())]}, TypeError, "b: expected a's dtype"),
        ({"branches": [LoraBranch(A, B, dropout_p=0.1)]}, ValueError, "no bias and no dropout"),
        (
            {"branches": [LoraBranch(A, B, torch.ones(2))]},
            ValueError,
            r"scaling: expected shape \[\], got \[2\]",
        ),
        (
            {"branches": [LoraBranch(A, B, torch.ones((), requires_grad=True))]},
            ValueError,
            "scaling: expected a tensor without requires_grad",
        ),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"base": BASE, "ids": IDS, "branches": [LoraBranch(A, B)], **arguments}
    with pytest.raises(error, match=message):
        lora_embedding(given["base"], given["ids"], given["branches"])

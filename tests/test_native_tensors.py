"""How torch's tensors reach the C++ kernels: by DLPack's C exchange API (csrc/tensors.h)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttune import _native
from fasttune._native._extension import threads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def converted(x: Tensor, out: Tensor) -> Tensor:
    _native.cpu().convert(x, out, threads())
    return out


def negative(x: Tensor) -> Tensor:
    """A view that torch negates as it reads."""
    view = torch.complex(x, -x).conj().imag
    assert view.is_neg() and torch.equal(view, x)
    return view


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_matrices_of_every_dtype_and_layout(source: torch.dtype, target: torch.dtype) -> None:
    torch.manual_seed(0)
    whole = torch.randn(7, 9).to(source)
    layouts = {
        "whole": whole,
        "rows apart": torch.randn(14, 9).to(source)[::2],
        "columns of a wider one": torch.randn(7, 20).to(source)[:, 3:12],
        "one row again and again": torch.randn(1, 9).to(source).expand(7, 9),
        "one column": torch.randn(7, 20).to(source)[:, 3:4],
        "a parameter": nn.Parameter(whole),
        "no rows": whole[:0],
    }
    for name, x in layouts.items():
        wide = torch.full((2 * len(x), 2 * x.shape[1]), 5.0, dtype=target)
        out = wide[::2, : x.shape[1]]
        assert torch.equal(converted(x, out), x.detach().to(target)), name
        assert wide[1::2].eq(5).all() and wide[:, x.shape[1] :].eq(5).all(), name


def test_what_a_kernel_cannot_read_is_refused() -> None:
    good, out = torch.randn(4, 6), torch.empty(4, 6)
    bad: dict[str, tuple[Any, type[Exception], str]] = {
        "columns apart": (torch.randn(6, 4).t(), ValueError, r"unit column stride.*\[4, 6\].*1, 4"),
        "three dimensions": (torch.randn(1, 4, 6), ValueError, r"\[1, 4, 6\]"),
        "negative": (negative(good), ValueError, "negative bit"),
        "another dtype": (good.double(), TypeError, "fp32, bf16 or fp16"),
        "integers": (good.long(), TypeError, "fp32, bf16 or fp16"),
        "no storage": (good.to("meta"), Exception, "meta"),
        "no tensor": (good.numpy(), TypeError, "incompatible function arguments"),
        "nothing": (None, TypeError, "incompatible function arguments"),
    }
    for name, (x, error, words) in bad.items():
        with pytest.raises(error, match=words):
            converted(x, out)
            pytest.fail(name)
        with pytest.raises(error, match=words):
            converted(good, x)
            pytest.fail(name)
    assert torch.equal(converted(good, out), good)


def test_vectors_are_contiguous_or_refused() -> None:
    """The biases of an adapter, which may have any float dtype or be missing."""
    torch.manual_seed(0)
    x, down, up = torch.randn(64, 32), torch.randn(16, 32), torch.randn(32, 16)
    z, y = torch.empty(64, 16), torch.empty(64, 32)
    keep_all = _native.cpu().Dropout(0, 0, 0, 0)

    def run(bias: Any) -> None:
        _native.cpu().bottleneck_forward(
            x, down, up, bias, -1, 1.0, keep_all, None, None, None, z, y, threads()
        )

    for bias in (None, *(torch.randn(16).to(dtype) for dtype in DTYPES)):
        run(bias)
        expected = x @ down.t() + (0 if bias is None else bias.float())
        assert torch.allclose(z, expected, atol=1e-4)
    for bias, words in ((torch.randn(32)[::2], "contiguous"), (negative(torch.randn(16)), "bit")):
        with pytest.raises(ValueError, match=words):
            run(bias)


def test_subclasses_are_read_as_tensors() -> None:
    class Named(Tensor):
        pass

    x, out = torch.randn(3, 5).as_subclass(Named), torch.empty(3, 5)
    assert torch.equal(converted(x, out), x.as_subclass(Tensor))


def test_shapes_are_compared_before_anything_is_read() -> None:
    torch.manual_seed(0)
    x, down, up, bias = (torch.randn(*s) for s in ((8, 32), (16, 32), (24, 16), (24,)))
    residual, z, y = torch.randn(8, 24), torch.empty(8, 16), torch.empty(8, 24)
    keep_all = _native.cpu().Dropout(0, 0, 0, 0)
    good = [x, down, up, None, -1, 1.0, keep_all, residual, bias, None, z, y, threads()]
    assert _native.cpu().bottleneck_forward(*good)
    short = {"down": 1, "up": 2, "residual": 7, "up_bias": 8}
    for name, place in short.items():
        wrong = list(good)
        tensor = good[place]
        wrong[place] = tensor[..., :-1].contiguous()
        with pytest.raises(ValueError, match=f"{name}: its shape"):
            _native.cpu().bottleneck_forward(*wrong)


def test_a_tensor_without_its_values_is_refused() -> None:
    x, out = torch.randn(4, 6), torch.empty(4, 6)
    x.untyped_storage().resize_(0)  # as FSDP leaves a parameter between its uses
    with pytest.raises(ValueError, match="values in memory"):
        converted(x, out)

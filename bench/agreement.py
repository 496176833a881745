"""No timing on a red test: the patched result must be as close to the truth as stock's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Both variants round the same number of times but in another order, so their errors are of the
# same size without being equal; over a whole tensor the norm of the error hardly varies.
ERROR_FACTOR = 3.0


def relative_error(value: Tensor, truth: Tensor) -> float:
    """L2 norm of the difference over that of the truth, in fp64."""
    reference = truth.double()
    return float((value.double() - reference).norm() / reference.norm())


def assert_agreement(
    stock: Mapping[str, Tensor],
    fasttune: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
) -> None:
    """Every tensor of ``fasttune`` may be ``ERROR_FACTOR`` times as far from ``truth`` as stock's.

    The floor is an eighth of a rounding step of ``dtype``, less than rounding the result once
    costs, and four of fp32, in which sums are kept: a single number can be exact by luck.

    Raises AssertionError naming the tensor, also where the truth is zero or not finite: then
    nothing would be compared.
    """
    assert stock.keys() == fasttune.keys() == truth.keys(), (set(stock), set(fasttune), set(truth))
    floor = torch.finfo(dtype).eps / 8 + 4 * torch.finfo(torch.float32).eps
    for name, reference in truth.items():
        size = float(reference.double().norm())
        assert 0 < size < float("inf"), f"{name}: the truth has norm {size}"
        error = relative_error(fasttune[name], reference)
        allowed = ERROR_FACTOR * relative_error(stock[name], reference) + floor
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def dropout_off(*models: nn.Module) -> Iterator[None]:
    """Every ``nn.Dropout`` keeps everything: random masks cannot be compared across variants."""
    layers = [layer for m in models for layer in m.modules() if isinstance(layer, nn.Dropout)]
    kept = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, p in zip(layers, kept, strict=True):
            layer.p = p

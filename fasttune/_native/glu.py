"""The gated activation of an MLP, in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune._native._activation import activation_codes
from fasttune._native._extension import DTYPE_CODES, cpu, matrix, threads


def glu_forward(
    gate: Tensor,  # [M, I]
    up: Tensor,  # [M, I]
    *,
    activation: str,
) -> Tensor:
    """y [M, I] = act(gate) up, in the dtype that torch promotes the two to."""
    dtype = torch.promote_types(gate.dtype, up.dtype)
    y = torch.empty(gate.shape, dtype=dtype)
    code = activation_codes()[activation]
    cpu().glu_forward(matrix(gate), matrix(up), matrix(y, mutable=True), code, threads())
    return y


def glu_backward(
    dy: Tensor,  # [M, I]
    gate: Tensor,  # [M, I]
    up: Tensor,  # [M, I]
    *,
    activation: str,
    dgate: Tensor | None,  # [M, I], written
    dup: Tensor | None,  # [M, I], written
) -> None:
    """dgate = dy up act'(gate), dup = dy act(gate); None where not needed."""
    cpu().glu_backward(
        matrix(dy),
        matrix(gate),
        matrix(up),
        _target(dgate, dy),
        _target(dup, dy),
        activation_codes()[activation],
        threads(),
    )


def _target(out: Tensor | None, like: Tensor) -> Any:
    """``out``, or a matrix without data."""
    if out is not None:
        return matrix(out, mutable=True)
    return cpu().MutableMatrix(0, like.shape[0], like.shape[1], 0, DTYPE_CODES[like.dtype])

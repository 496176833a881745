"""The gated activation of an MLP, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune._native._activation import activation_codes
from fasttune._native._extension import cpu, threads


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
    cpu().glu_forward(gate, up, y, code, threads())
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
        dy,
        gate,
        up,
        dgate,
        dup,
        activation_codes()[activation],
        threads(),
    )

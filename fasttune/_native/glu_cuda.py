"""The gated activation of an MLP, in CUDA C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune._native._activation import activation_codes
from fasttune._native._cuda import launch
from fasttune._native._extension import DTYPE_CODES


def glu_forward(
    gate: Tensor,  # [M, I], unit column stride
    up: Tensor,  # [M, I] in gate's dtype, likewise
    *,
    activation: str,
) -> Tensor:
    """y [M, I] = act(gate) up."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    launch(
        "glu_fwd",
        gate.device,
        *(gate, up, y, *gate.shape, gate.stride(0), up.stride(0), y.stride(0)),
        DTYPE_CODES[gate.dtype],
        activation_codes()[activation],
    )
    return y


def glu_backward(
    dy: Tensor,  # [M, I], unit column stride
    gate: Tensor,  # [M, I] in dy's dtype, likewise
    up: Tensor,  # [M, I] in dy's dtype, likewise
    *,
    activation: str,
    dgate: Tensor | None,  # [M, I], likewise; written
    dup: Tensor | None,  # [M, I], likewise; written
) -> None:
    """dgate = dy up act'(gate), dup = dy act(gate); None where not needed."""
    strides = [0 if t is None else t.stride(0) for t in (dy, gate, up, dgate, dup)]
    launch(
        "glu_bwd",
        dy.device,
        *(dy, gate, up, dgate, dup, *dy.shape, *strides),
        DTYPE_CODES[dy.dtype],
        activation_codes()[activation],
    )

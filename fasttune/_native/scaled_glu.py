"""The gated activation of an MLP whose hidden state (IA)^3 scales, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune._native import _norm
from fasttune._native._activation import activation_codes
from fasttune._native._extension import cpu, fp32, threads


def scaled_glu_forward(
    gate: Tensor,  # [M, I]
    up: Tensor,  # [M, I]
    scale: Tensor,  # [I]
    *,
    activation: str,
) -> Tensor:
    """y [M, I] = act(gate) up scale, in the dtype that torch promotes gate and up to."""
    y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))
    factors = fp32(scale)
    cpu().scaled_glu_forward(
        gate,
        up,
        factors.data_ptr(),
        y,
        activation_codes()[activation],
        threads(),
    )
    return y


def scaled_glu_backward(
    dy: Tensor,  # [M, I]
    gate: Tensor,  # [M, I]
    up: Tensor,  # [M, I]
    scale: Tensor,  # [I]
    *,
    activation: str,
    dgate: Tensor | None,  # [M, I], written
    dup: Tensor | None,  # [M, I], written
    need_dscale: bool,
) -> Tensor | None:
    """dgate = dy scale up act'(gate), dup = dy scale act(gate), None where not needed; returns
    dscale [I] fp32 = sum_m dy act(gate) up, or None.
    """
    if len({dy.dtype, gate.dtype, up.dtype}) > 1:  # gate and up of two dtypes: rare
        outs = [(out, None if out is None else out.float()) for out in (dgate, dup)]
        dscale = scaled_glu_backward(
            dy.float(), gate.float(), up.float(), scale, activation=activation,
            dgate=outs[0][1], dup=outs[1][1], need_dscale=need_dscale,
        )  # fmt: skip
        for out, wide in outs:
            if out is not None and wide is not None and wide is not out:
                out.copy_(wide)
        return dscale
    rows, cols = dy.shape
    factors = fp32(scale)
    parts = _norm.parts(rows, need_dscale)
    dscale, sums = _norm.column_sums("scaled_glu_dscale", need_dscale, parts, cols)
    cpu().scaled_glu_backward(
        dy,
        gate,
        up,
        factors.data_ptr(),
        dgate,
        dup,
        sums,
        activation_codes()[activation],
        threads(),
    )
    return dscale

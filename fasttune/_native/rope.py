"""Rotary position embedding, in C++."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fasttune._native._extension import DTYPE_CODES, cpu, threads


def rope_forward(
    q: Tensor | None,  # [B, Hq, S, D]
    k: Tensor | None,  # [B, Hk, S, D]
    cos: Tensor,  # [B or 1, S, R]
    sin: Tensor,  # [B or 1, S, R]
    *,
    interleaved: bool,
    q_out: Tensor | None,
    k_out: Tensor | None,
) -> None:
    """Writes the rotated q and k into q_out and k_out; docs/design.md states the formulas."""
    _rotate([(q, q_out), (k, k_out)], cos, sin, interleaved, transposed=False)


def rope_backward(
    dq: Tensor | None,  # [B, Hq, S, D]
    dk: Tensor | None,  # [B, Hk, S, D]
    cos: Tensor,  # [B or 1, S, R]
    sin: Tensor,  # [B or 1, S, R]
    *,
    interleaved: bool,
    dq_out: Tensor | None,
    dk_out: Tensor | None,
) -> None:
    """Writes the gradients by q and k into dq_out and dk_out: the transpose of the forward."""
    _rotate([(dq, dq_out), (dk, dk_out)], cos, sin, interleaved, transposed=True)


def _rotate(
    pairs: list[tuple[Tensor | None, Tensor | None]],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    *,
    transposed: bool,
) -> None:
    given = [(x, y) for x, y in pairs if x is not None and y is not None]
    batch, _, positions, features = given[0][0].shape
    cpu().rope(
        [_operand(x, y) for x, y in given],
        _tables(cos, sin),
        batch,
        positions,
        features,
        cos.shape[-1],
        interleaved,
        transposed,
        threads(),
    )


def _operand(x: Tensor, y: Tensor) -> Any:
    if x.stride(3) != 1 or y.stride(3) != 1 or x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(f"expected alike [B, H, S, D] with unit stride in D, got {x.stride()}")
    return cpu().RopeOperand(
        x.data_ptr(), y.data_ptr(), x.shape[1], *x.stride()[:3], *y.stride()[:3],
        DTYPE_CODES[x.dtype],
    )  # fmt: skip


def _tables(cos: Tensor, sin: Tensor) -> Any:
    if cos.stride(2) != 1 or sin.stride(2) != 1 or cos.dtype != sin.dtype:
        raise ValueError(f"expected alike [B, S, R] with unit stride in R, got {cos.stride()}")
    strides = [
        stride
        for table in (cos, sin)
        for stride in (table.stride(0) if table.shape[0] > 1 else 0, table.stride(1))
    ]
    return cpu().RopeTables(cos.data_ptr(), sin.data_ptr(), *strides, DTYPE_CODES[cos.dtype])

"""Edits of listed rows within a low-rank subspace, in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune._native._activation import activation_codes
from fasttune._native._extension import cpu, fp32, threads
from fasttune._native.lora_linear import LANES, dropout_of


def reft_forward(
    h: Tensor,  # [M, H]
    rows: Tensor | None,  # [P] int64
    rotation: Tensor,  # [R, H]
    source: Tensor,  # [R, H]
    bias: Tensor | None,  # [R]
    *,
    difference: bool,
    activation: str,
    scale: float,
    seed: Tensor | None,
    threshold: int,
    y: Tensor,  # [M, H], or h
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Writes the listed rows of y; -> those of h [P, H] (None if rows is None), z and d [P, R]."""
    operands = _Operands(h, rows, rotation, source, bias)
    call = operands.call(difference, activation, scale, seed, threshold)
    z, d = operands.results(), operands.results()
    x = None if rows is None else torch.empty(rows.shape[0], h.shape[1], dtype=h.dtype)
    cpu().reft_forward(h, call, y, x, z.data_ptr(), d.data_ptr(), threads())
    return x, z, d


def reft_backward(
    dy: Tensor,  # [M, H]
    rows: Tensor | None,  # [P] int64
    rotation: Tensor,  # [R, H]
    source: Tensor,  # [R, H]
    z: Tensor,  # [P, R] fp32
    *,
    difference: bool,
    activation: str,
    scale: float,
    seed: Tensor | None,
    threshold: int,
    dh: Tensor | None,  # [M, H]
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Writes the listed rows of dh; -> those of dy [P, H] (None if rows is None), dz and dd [P, R]
    fp32.
    """
    operands = _Operands(dy, rows, rotation, source, None)
    call = operands.call(difference, activation, scale, seed, threshold)
    dz, dd = operands.results(), operands.results()
    g = None if rows is None else torch.empty(rows.shape[0], dy.shape[1], dtype=dy.dtype)
    cpu().reft_backward(
        dy,
        call,
        z.data_ptr(),
        dh,
        g,
        dz.data_ptr(),
        dd.data_ptr(),
        threads(),
    )
    return g, dz, dd


class _Operands:
    """Keeps the fp32 copies alive as long as their addresses are used."""

    def __init__(
        self,
        h: Tensor,
        rows: Tensor | None,
        rotation: Tensor,
        source: Tensor,
        bias: Tensor | None,
    ) -> None:
        self.rows = None if rows is None else rows.contiguous()
        self.count = h.shape[0] if rows is None else rows.shape[0]
        self.rotation, self.source = _padded_lines(rotation), _padded_lines(source)
        self.bias = None if bias is None else fp32(bias)

    def call(
        self, difference: bool, activation: str, scale: float, seed: Tensor | None, threshold: int
    ) -> Any:
        rank, stride = self.rotation.shape
        code = -1 if activation == "identity" else activation_codes()[activation]
        return cpu().ReftCall(
            0 if self.rows is None else self.rows.data_ptr(),
            self.count,
            rank,
            stride,
            self.rotation.data_ptr(),
            self.source.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            difference,
            code,
            dropout_of(seed, threshold, 0, 0),
            scale,
        )

    def results(self) -> Tensor:
        return torch.empty(self.count, self.rotation.shape[0], dtype=torch.float32)


def _padded_lines(x: Tensor) -> Tensor:
    """x [R, H] as fp32 with zero columns up to a multiple of LANES."""
    missing = -x.shape[1] % LANES
    x = fp32(x)
    return torch.nn.functional.pad(x, (0, missing)) if missing else x

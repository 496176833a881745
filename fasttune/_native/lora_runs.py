"""LoRA's products of a batch in which runs of rows have branches of their own, in C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttune._native._extension import cpu, fp32, threads
from fasttune._native.lora_linear import MAX_RANK, VENDOR_RANK, dropout_of

Run = tuple[int, int, int]  # first row, end, branch


class Branches(NamedTuple):
    """The branches of a call: A [R, K], B [N, R], biases [N] or None, the scales of t and d, and
    dropout's seed, thresholds and streams. Masks count the rows of the batch.
    """

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    scales: Sequence[float]
    seed: Tensor | None
    thresholds: Sequence[int]
    streams: Sequence[int]

    def dropouts(self) -> list[Any]:
        draws = zip(self.thresholds, self.streams, strict=True)
        return [dropout_of(self.seed, threshold, stream, 0) for threshold, stream in draws]


def takes_runs(x: Tensor, branches: Branches) -> bool:
    """True if the kernels sum every branch in one go, and torch's products are not faster."""
    ranks = [a.shape[0] for a in branches.a]
    vendor = x.dtype == torch.float32 and max(ranks) >= VENDOR_RANK
    fits = min(ranks) > 0 and max(ranks) <= MAX_RANK and not vendor and x.shape[1] > 0
    factors = (*branches.a, *branches.b)
    return fits and all((f.stride(1) == 1 or f.shape[1] == 1) and not f.is_neg() for f in factors)


def runs_forward(
    x: Tensor,  # [M, K]
    product: Tensor | None,  # w [K, N], with which x is a product that takes_product is true of
    addend: Tensor | None,  # [M, N], fp32 or of the output's dtype
    runs: Sequence[Run],
    branches: Branches,
    out: Tensor,  # [M, N]
) -> list[Tensor]:
    """t [rows, R] fp32 of every run; its rows of ``out`` become addend + bias + t B^T + x w."""
    ts = [torch.empty(end - first, branches.a[j].shape[0]) for first, end, j in runs]
    biases = [None if bias is None else fp32(bias) for bias in branches.biases]
    right, transposed = _weight(product)
    cpu().runs_forward(
        x, right, transposed, addend, runs, branches.a, branches.b, biases, branches.scales,
        branches.dropouts(), ts, out, threads(),
    )  # fmt: skip
    return ts


def runs_backward(
    dy: Tensor,  # [M, N]
    product: Tensor | None,  # w [N, K], likewise with dy
    addend: Tensor | None,  # [M, K]
    x: Tensor | None,  # [M, K], for dA
    runs: Sequence[Run],
    branches: Branches,
    ts: Sequence[Tensor | None],  # of every run, for dB
    out: Tensor | None,  # [M, K], dx
    need_a: Sequence[bool],
    need_b: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """dA and dB of every branch, summed over its runs in fp32 and rounded once, None where not
    needed; the runs' rows of ``out`` become addend + keep * (d A) + dy w.
    """
    das, dbs = (
        [
            torch.empty_like(f, memory_format=torch.contiguous_format) if flag else None
            for f, flag in zip(factors, flags, strict=True)
        ]
        for factors, flags in ((branches.a, need_a), (branches.b, need_b))
    )
    right, transposed = _weight(product)
    cpu().runs_backward(
        dy, right, transposed, addend, x, runs, branches.a, branches.b, ts, branches.scales,
        branches.dropouts(), out, das, dbs, threads(),
    )  # fmt: skip
    return das, dbs


def _weight(right: Tensor | None) -> tuple[Tensor | None, bool]:
    """A weight as it lies by rows, and whether that is its transpose."""
    if right is None or right.stride(1) == 1:
        return right, False
    return right.t(), True

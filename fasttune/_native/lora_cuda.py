"""The products of LoRA branches on tensor cores, in CUDA C++.

x and dy have one 16-bit dtype, t and d are fp32. A and B have that dtype too or, beside bf16, are
fp32: then they go in as three terms of bf16, which is exact, with ranks of their own (24 bits are
three times eight; fp16 has too few exponents for it). Numbers of features and ranks are multiples
of 8, so that rows start at multiples of 16 bytes; an input whose rows do not is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from fasttune._native._cuda import launch
from fasttune._native._extension import DTYPE_CODES

MULTIPLE = 8  # elements of 16 bits in the widest access
MAX_RANK = 64
MAX_RANK_FP32 = 16  # of which a term each makes 48
_TERMS = 3
_GROUP_BRANCHES, _GROUP_RANKS = 3, 64  # kGroupBranches and kGroupRanks of csrc/cuda/lora.cuh
_RANK_BUCKETS = (16, 32, 64)

# Sums come in parts that depend on the shape alone, so that their order does: enough blocks for two
# of them on each multiprocessor of a large GPU, of at least so many elements a block.
_BLOCKS = 256
_TILE = 64  # rows of x, or columns, that a block has
_COLUMN_STEP, _MIN_COLUMNS, _MAX_COLUMN_SPLITS = 64, 512, 8
_ROW_STEP, _MIN_ROWS, _MAX_ROW_SPLITS = 32, 256, 16


class Draw(TypedDict):
    """Where the random bits of a branch's dropout come from: as the keywords of `lora_down`."""

    seed: Tensor | None  # 0-d int64; unused without dropout
    threshold: int  # 0 .. 65536: a lane below it is dropped
    branch: int


def lora_down(
    x: Tensor,  # [M, K], unit column stride
    a: Tensor,  # [R, K]
    scale: float,
    scale_tensor: Tensor | None,  # 0-d, None for 1
    *,
    seed: Tensor | None,
    threshold: int,
    branch: int,
) -> Tensor:
    """t [M, R] fp32 = scale (x * keep) a^T."""
    draw: Draw = {"seed": seed, "threshold": threshold, "branch": branch}
    return _down_one(x, a, scale, scale_tensor, draw)


def lora_down_group(
    x: Tensor,
    a: Sequence[Tensor],
    scales: Sequence[float],
    scale_tensors: Sequence[Tensor | None],
    draws: Sequence[Draw],
) -> list[Tensor] | None:
    """t_j of every branch in one pass over x, or None where they do not fit one kernel."""
    if not _fits(a, x.dtype):
        return None
    return _down(x, a, scales, scale_tensors, draws)


def lora_up(
    t: Tensor,  # [M, R] fp32
    b: Tensor,  # [N, R]
    bias: Tensor | None,  # [N]
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [M, N] = bias + t b^T, in ``out_dtype``, of 16 bits."""
    y = t.new_empty((t.shape[0], b.shape[0]), dtype=out_dtype)
    if b.dtype != out_dtype:
        t, b = torch.cat([t] * _TERMS, dim=1), torch.cat(_terms(b), dim=1)
    launch(
        "lora_up",
        t.device,
        *(_rows(t), _rows(b), None if bias is None else bias.detach().float().contiguous(), y),
        *(*y.shape, t.shape[1], y.stride(0), DTYPE_CODES[out_dtype]),
    )
    return y


def lora_up_group(
    ts: Sequence[Tensor],
    bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """:func:`lora_up` of every projection, a launch each."""
    operands = zip(ts, bs, biases, strict=True)
    return [lora_up(t, b, bias, out_dtype=out_dtype) for t, b, bias in operands]


def lora_up_backward(
    dy: Tensor,  # [M, N], unit column stride
    t: Tensor | None,  # [M, R] fp32; may be None if db is not needed
    b: Tensor,  # [N, R]
    scale: float,
    scale_tensor: Tensor | None,  # 0-d, None for 1
    *,
    need_d: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """d [M, R] fp32 = scale dy b, db [N, R] in b's dtype = dy^T t; None where not needed."""
    none: Draw = {"seed": None, "threshold": 0, "branch": 0}
    d = _down_one(dy, b, scale, scale_tensor, none, transposed=True) if need_d else None
    db = None
    if need_db:
        assert t is not None
        db = _weight_gradients(dy, [t], [none], transposed=True)[0].to(b.dtype)
    return d, db


def lora_up_backward_group(
    dys: Sequence[Tensor],
    ts: Sequence[Tensor],
    bs: Sequence[Tensor],
    scales: Sequence[float],
    scale_tensors: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """d_j and db_j of every branch, a launch each."""
    operands = zip(dys, ts, bs, scales, scale_tensors, strict=True)
    pairs = [lora_up_backward(*own, need_d=True, need_db=True) for own in operands]
    return [d for d, _ in pairs], [db for _, db in pairs]


def lora_down_backward(
    d: Tensor,  # [M, R] fp32
    a: Tensor,  # [R, K]
    x: Tensor | None,  # [M, K], unit column stride; may be None if da is not needed
    *,
    seed: Tensor | None,
    threshold: int,
    branch: int,
    dx_dtype: torch.dtype,
    need_dx: bool,
    need_da: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx0 [M, K] = keep * (d a), da [R, K] in a's dtype = d^T (x * keep); None where not needed."""
    draw: Draw = {"seed": seed, "threshold": threshold, "branch": branch}
    dx = da = None
    if need_dx and a.dtype == dx_dtype:
        dx = _input_gradient([d], [a], [draw], dx_dtype)
    elif need_dx:
        ds, factor = torch.cat([d] * _TERMS, dim=1), torch.cat(_terms(a))
        dx = _input_gradient([ds], [factor], [draw], dx_dtype)
    if need_da:
        assert x is not None
        da = _weight_gradients(x, [d], [draw])[0].to(a.dtype)
    return dx, da


def lora_down_backward_group(
    ds: Sequence[Tensor],
    a: Sequence[Tensor],
    x: Tensor | None,
    draws: Sequence[Draw],
    *,
    dx_dtype: torch.dtype,
    need_dx: bool,
    need_da: bool,
) -> tuple[Tensor | None, list[Tensor] | None] | None:
    """dx0 = sum_j keep_j * (d_j a_j) and every da_j, a pass each; None where they do not fit."""
    if not _fits(a, dx_dtype):
        return None
    dx = _input_gradient(ds, a, draws, dx_dtype) if need_dx else None
    if not need_da:
        return dx, None
    assert x is not None
    grads = _weight_gradients(x, ds, draws)
    return dx, [grad.to(factor.dtype) for grad, factor in zip(grads, a, strict=True)]


def _fits(factors: Sequence[Tensor], dtype: torch.dtype) -> bool:  # [R, K] each
    if any(factor.dtype != dtype for factor in factors):
        return False
    ranks = [factor.shape[0] for factor in factors]
    width = next(bucket for bucket in _RANK_BUCKETS if max(ranks) <= bucket)
    return len(ranks) <= _GROUP_BRANCHES and len(ranks) * width <= _GROUP_RANKS


def _terms(factor: Tensor) -> list[Tensor]:
    """Matrices of bf16 that add up to the fp32 factor."""
    terms, rest = [], factor.detach().contiguous()
    for _ in range(_TERMS):
        upper = (rest.view(torch.int32) & -65536).view(torch.float32)  # cut off, not rounded
        terms.append(upper.to(torch.bfloat16))
        rest = (rest - upper).nan_to_num_(nan=0.0)  # what is not finite stays in the first term
    return terms


def _down_one(
    x: Tensor,
    factor: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    draw: Draw,
    *,
    transposed: bool = False,
) -> Tensor:
    operands = ([scale], [scale_tensor], [draw])
    if factor.dtype == x.dtype:
        return _down(x, [factor], *operands, transposed=transposed)[0]
    together = torch.cat(_terms(factor), dim=1 if transposed else 0)
    t = _down(x, [together], *operands, transposed=transposed)[0]
    return t.view(t.shape[0], _TERMS, factor.shape[1 if transposed else 0]).sum(1)


def _down(
    x: Tensor,
    a: Sequence[Tensor],
    scales: Sequence[float],
    scale_tensors: Sequence[Tensor | None],
    draws: Sequence[Draw],
    *,
    transposed: bool = False,
) -> list[Tensor]:
    rows, cols = x.shape
    ranks = [factor.shape[1 if transposed else 0] for factor in a]
    x, a, seeds = _rows(x), [_rows(factor) for factor in a], _seeds(draws)
    factors = [None if own is None else own.detach().float() for own in scale_tensors]
    splits, share = _split(cols, rows, _COLUMN_STEP, _MIN_COLUMNS, _MAX_COLUMN_SPLITS)
    sizes = [rows * rank for rank in ranks]
    t, partial = _sums(x, sum(sizes), splits)
    branches = [
        (_address(factor), _address(own), _address(seed), float(scale), rank, *_bits(draw))
        for factor, own, seed, scale, rank, draw in zip(
            a, factors, seeds, scales, ranks, draws, strict=True
        )
    ]
    launch(
        "lora_down",
        x.device,
        *(x, t, partial, rows, cols, x.stride(0), share, splits),
        *(transposed, branches, DTYPE_CODES[x.dtype]),
        reachable=_given(a, factors, seeds),
    )
    parts = zip(t.split(sizes), ranks, strict=True)
    return [part.view(rows, rank) for part, rank in parts]


def _input_gradient(
    ds: Sequence[Tensor], a: Sequence[Tensor], draws: Sequence[Draw], dtype: torch.dtype
) -> Tensor:
    ds, a, seeds = [_rows(d) for d in ds], [_rows(factor) for factor in a], _seeds(draws)
    dx = ds[0].new_empty((ds[0].shape[0], a[0].shape[1]), dtype=dtype)
    branches = _gradient_branches(ds, a, seeds, draws)
    launch(
        "lora_input_gradient",
        dx.device,
        *(dx, *dx.shape, dx.stride(0), branches, DTYPE_CODES[dtype]),
        reachable=_given(ds, a, seeds),
    )
    return dx


def _weight_gradients(
    x: Tensor, ds: Sequence[Tensor], draws: Sequence[Draw], *, transposed: bool = False
) -> list[Tensor]:
    """d_j^T (x * keep_j) [R_j, K] fp32, or its transpose."""
    rows, cols = x.shape
    x, ds, seeds = _rows(x), [_rows(d) for d in ds], _seeds(draws)
    splits, share = _split(rows, cols, _ROW_STEP, _MIN_ROWS, _MAX_ROW_SPLITS)
    ranks = [d.shape[1] for d in ds]
    sizes = [cols * rank for rank in ranks]
    out, partial = _sums(x, sum(sizes), splits)
    branches = _gradient_branches(ds, [None] * len(ds), seeds, draws)
    launch(
        "lora_weight_gradient",
        x.device,
        *(x, out, partial, rows, cols, x.stride(0), share, splits),
        *(transposed, branches, DTYPE_CODES[x.dtype]),
        reachable=_given(ds, seeds),
    )
    shapes = [(cols, rank) if transposed else (rank, cols) for rank in ranks]
    return [part.view(shape) for part, shape in zip(out.split(sizes), shapes, strict=True)]


def _split(summed: int, kept: int, step: int, least: int, most: int) -> tuple[int, int]:
    """In how many splits `summed` rows or columns are added, and how many one has."""
    blocks = max(-(-kept // _TILE), 1)
    splits = max(min(-(-_BLOCKS // blocks), most, summed // least), 1)
    share = max(-(-summed // splits // step) * step, step)
    return max(-(-summed // share), 1), share


def _sums(like: Tensor, count: int, splits: int) -> tuple[Tensor, Tensor | None]:
    out = like.new_empty(count, dtype=torch.float32)
    return out, None if splits == 1 else like.new_empty((splits, count), dtype=torch.float32)


def _rows(matrix: Tensor) -> Tensor:
    """The matrix, or a copy of it, with rows that start at multiples of 16 bytes."""
    size = matrix.element_size()
    unit = matrix.shape[1] < 2 or matrix.stride(1) == 1
    if unit and matrix.data_ptr() % 16 == 0 and matrix.stride(0) * size % 16 == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def _seeds(draws: Sequence[Draw]) -> list[Tensor | None]:
    return [draw["seed"] if draw["threshold"] > 0 else None for draw in draws]


def _bits(draw: Draw) -> tuple[int, int]:
    return draw["threshold"], draw["branch"]


def _gradient_branches(
    ds: Sequence[Tensor],
    a: Sequence[Tensor | None],
    seeds: Sequence[Tensor | None],
    draws: Sequence[Draw],
) -> list[tuple[int, ...]]:
    return [
        (_address(d), _address(factor), _address(seed), d.shape[1], *_bits(draw))
        for d, factor, seed, draw in zip(ds, a, seeds, draws, strict=True)
    ]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _given(*lists: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensors in lists for tensor in tensors if tensor is not None]

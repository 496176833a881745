"""The C++ kernels: validates tensors and passes their addresses. Nothing else calls ``data_ptr``.

The primitives carry the names and arguments of ``fasttune_kernels`` (docs/design.md states them),
plus ``addend`` where a C++ kernel folds the product of the base layer into its single rounding.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
import threading
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_RANK = 256  # accumulators of csrc/cpu/lora_linear.cpp
LANES = 16  # kLanes of csrc/cpu/kernels.h


def _bind_openmp() -> None:
    """Make torch's own OpenMP runtime visible to _cpu, which is linked without one."""
    if sys.platform != "linux":
        return
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "libgomp" in line}
    path = next(iter(sorted(loaded)), None) or ctypes.util.find_library("gomp")
    if path is None:
        raise ImportError("fasttune._cpu needs libgomp, and torch has not loaded one")
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


@lru_cache(maxsize=1)
def cpu() -> ModuleType:
    """The extension module, loaded at the first use.

    Raises:
        ImportError: the extension was not built for this Python.
    """
    _bind_openmp()
    from fasttune import _cpu

    return _cpu


@lru_cache(maxsize=1)
def cpu_missing() -> str | None:
    """Why the C++ kernels cannot be used, or None."""
    try:
        cpu()
    except ImportError as error:
        return f"the C++ extension does not load: {error}"
    return None


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_scratch = _Scratch()


def scratch(name: str, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A reusable CPU buffer [rows, cols] of this thread; its content is lost at the next call.

    Large temporaries from malloc cost a page fault per 4 KB each time; this one stays mapped.
    """
    flat = _scratch.buffers.get((name, dtype))
    if flat is None or flat.numel() < rows * cols:
        flat = torch.empty(rows * cols, dtype=dtype)
        _scratch.buffers[name, dtype] = flat
    return flat[: rows * cols].view(rows, cols)


def free_scratch() -> None:
    """Give this thread's scratch buffers back to the allocator."""
    _scratch.buffers.clear()


def _threads() -> int:
    return torch.get_num_threads()


def _matrix(x: Tensor, *, mutable: bool = False) -> Any:
    if x.dim() != 2 or (x.numel() and x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"expected a matrix with unit column stride, got {x.shape}, {x.stride()}")
    kind = cpu().MutableMatrix if mutable else cpu().Matrix
    return kind(x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), DTYPE_CODES[x.dtype])


def _dropout(seed: Tensor | None, threshold: int, branch: int, row_offset: int) -> Any:
    bits = 0 if seed is None or threshold == 0 else int(seed.item()) & 0xFFFFFFFFFFFFFFFF
    return cpu().Dropout(bits, threshold, branch, row_offset)


def _fp32(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).contiguous()


def _padded(x: Tensor) -> Tensor:
    """x [M, R] as fp32 with zero columns up to a multiple of LANES."""
    rank = x.shape[1]
    if rank % LANES == 0:
        return _fp32(x)
    out = torch.zeros(x.shape[0], -(-rank // LANES) * LANES, dtype=torch.float32)
    out[:, :rank] = x.detach()
    return out


def _scale(scale: float, scale_tensor: Tensor | None) -> float:
    return scale if scale_tensor is None else scale * float(scale_tensor)


def convert(src: Tensor, dst: Tensor) -> Tensor:
    """dst [M, N] = src [M, N], rounded to nearest even; returns dst."""
    cpu().convert(_matrix(src), _matrix(dst, mutable=True), _threads())
    return dst


def lora_down(
    x: Tensor,  # [M, K]
    a: Tensor,  # [R, K]
    scale: float,
    scale_tensor: Tensor | None,
    *,
    seed: Tensor | None,
    threshold: int,
    branch: int,
    row_offset: int = 0,
) -> Tensor:
    """t [M, R] fp32 = scale (x * keep) A^T."""
    rank = a.shape[0]
    t = torch.empty(x.shape[0], rank, dtype=torch.float32)
    panel = _padded(a.t())  # [K, padded R]
    dropout = _dropout(seed, threshold, branch, row_offset)
    factor = _scale(scale, scale_tensor)
    cpu().lora_reduce(_matrix(x), panel.data_ptr(), rank, factor, dropout, t.data_ptr(), _threads())
    return t


def lora_up(
    t: Tensor,  # [M, R] fp32
    b: Tensor,  # [N, R]
    bias: Tensor | None,  # [N]
    *,
    out_dtype: torch.dtype,
    addend: Tensor | None = None,  # [M, N] fp32
    out: Tensor | None = None,  # [M, N]
) -> Tensor:
    """y0 [M, N] = addend + bias + t B^T, rounded once; written into ``out`` if given. R may be
    0.
    """
    if out is None:
        out = torch.empty(t.shape[0], b.shape[0], dtype=out_dtype)
    _expand(t, _fp32(b.t()), bias, _dropout(None, 0, 0, 0), out, addend)
    return out


def lora_up_backward(
    dy: Tensor,  # [M, N]
    t: Tensor | None,  # [M, R] fp32
    b: Tensor,  # [N, R]
    scale: float,
    scale_tensor: Tensor | None,
    *,
    need_d: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """d [M, R] fp32 = scale dy B, db [N, R] = dy^T t; None where not needed."""
    d = db = None
    matrix, none = _matrix(dy), _dropout(None, 0, 0, 0)
    rank = b.shape[1]
    if need_d:
        d = torch.empty(dy.shape[0], rank, dtype=torch.float32)
        panel = _padded(b)
        factor = _scale(scale, scale_tensor)
        cpu().lora_reduce(matrix, panel.data_ptr(), rank, factor, none, d.data_ptr(), _threads())
    if need_db:
        assert t is not None
        db = torch.empty_like(b, memory_format=torch.contiguous_format)
        padded = _padded(t)
        cpu().lora_outer(
            matrix, padded.data_ptr(), rank, none, _matrix(db, mutable=True), False, _threads()
        )
    return d, db


def lora_down_backward(
    d: Tensor,  # [M, R] fp32
    a: Tensor,  # [R, K]
    x: Tensor | None,  # [M, K]
    *,
    seed: Tensor | None,
    threshold: int,
    branch: int,
    row_offset: int = 0,
    dx_dtype: torch.dtype,
    need_dx: bool,
    need_da: bool,
    addend: Tensor | None = None,  # [M, K] fp32
) -> tuple[Tensor | None, Tensor | None]:
    """dx0 [M, K] = addend + keep * (d A), da [R, K] = d^T (x * keep); None where not needed."""
    dx = da = None
    dropout = _dropout(seed, threshold, branch, row_offset)
    if need_dx:
        dx = torch.empty(d.shape[0], a.shape[1], dtype=dx_dtype)
        _expand(d, _fp32(a), None, dropout, dx, addend)
    if need_da:
        assert x is not None
        da = torch.empty_like(a, memory_format=torch.contiguous_format)
        padded = _padded(d)
        cpu().lora_outer(
            _matrix(x),
            padded.data_ptr(),
            a.shape[0],
            dropout,
            _matrix(da, mutable=True),
            True,
            _threads(),
        )
    return dx, da


def _expand(
    t: Tensor, panel: Tensor, bias: Tensor | None, dropout: Any, out: Tensor, addend: Tensor | None
) -> None:
    bias_fp32 = None if bias is None else _fp32(bias)
    cpu().lora_expand(
        t.data_ptr(),
        panel.data_ptr(),
        t.shape[1],
        0 if addend is None else addend.data_ptr(),
        0 if addend is None else addend.stride(0),
        0 if bias_fp32 is None else bias_fp32.data_ptr(),
        dropout,
        _matrix(out, mutable=True),
        _threads(),
    )


def cross_entropy_rows_(
    logits: Tensor,  # [C, V], overwritten if need_grad
    targets: Tensor,  # [C] int64
    *,
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    need_grad: bool,
    need_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss, correctness and entropy of each row; docs/design.md states the formulas."""
    rows = logits.shape[0]
    loss = torch.empty(rows, dtype=torch.float32)
    correct = torch.empty_like(loss) if need_stats else None
    entropy = torch.empty_like(loss) if need_stats else None
    targets = targets.contiguous()
    cpu().cross_entropy_rows(
        _matrix(logits, mutable=True),
        targets.data_ptr(),
        ignore_index,
        logit_scale,
        softcap,
        label_smoothing,
        z_loss,
        need_grad,
        loss.data_ptr(),
        0 if correct is None else correct.data_ptr(),
        0 if entropy is None else entropy.data_ptr(),
        _threads(),
    )
    return loss, correct, entropy

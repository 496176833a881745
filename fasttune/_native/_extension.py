"""Loads the extension module fasttune._cpu, and what every primitive needs to call it."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import mmap
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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
        ImportError: the extension was not built for this Python, or torch's tensors are exchanged
            in a way that it does not know.
    """
    _bind_openmp()
    extension = importlib.import_module("fasttune._cpu")
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        raise ImportError("fasttune._cpu needs DLPack's C exchange API, which torch 2.13 has")
    extension.use_tensors(exchange, Tensor, Parameter)
    return extension


@lru_cache(maxsize=1)
def cpu_missing() -> str | None:
    """Why the C++ kernels cannot be used, or None."""
    try:
        cpu()
    except ImportError as error:
        return f"the C++ extension does not load: {error}"
    return None


_HUGE_PAGE = 2 << 20  # bytes


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_scratch = _Scratch()


def scratch(name: str, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A reusable CPU buffer [rows, cols] of this thread; its content is lost at the next call.

    Large temporaries from malloc cost a page fault per 4 KB each time; this one stays mapped.
    """
    return _kept(name, rows * cols, dtype)[: rows * cols].view(rows, cols)


def room(name: str, elements: int) -> int:
    """The address of such a buffer of fp32, for a kernel."""
    return _kept(name, elements, torch.float32).data_ptr()


def _kept(name: str, elements: int, dtype: torch.dtype) -> Tensor:
    flat = _scratch.buffers.get((name, dtype))
    if flat is None or flat.numel() < elements:
        flat = _in_huge_pages(elements, dtype)
        _scratch.buffers[name, dtype] = flat
    return flat


def _in_huge_pages(elements: int, dtype: torch.dtype) -> Tensor:
    """A buffer [elements] that the kernel is asked to put in pages of 2 MB if it is at least as
    large: of wide rows, each lies in small pages of its own, and tiles read 16 of them at once.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    size = elements * dtype.itemsize
    if advice is None or size < _HUGE_PAGE:
        return torch.empty(elements, dtype=dtype)
    area = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages; small ones do as well
        area.madvise(advice)
    data = torch.frombuffer(area, dtype=torch.uint8)  # keeps the mapping alive
    start = -data.data_ptr() % _HUGE_PAGE
    return data[start : start + size].view(dtype)


def free_scratch() -> None:
    """Give this thread's scratch buffers back to the allocator."""
    _scratch.buffers.clear()


def threads() -> int:
    return torch.get_num_threads()


def fp32(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).resolve_neg().contiguous()


def convert(src: Tensor, dst: Tensor) -> Tensor:
    """dst [M, N] = src [M, N], rounded to nearest even; returns dst."""
    cpu().convert(src, dst, threads())
    return dst

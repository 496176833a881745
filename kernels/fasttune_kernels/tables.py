"""Launch configurations, chosen without timing anything at run time.

Tuning at run time would change the order of reductions between runs, let ranks disagree and break
CUDA-graph capture, so the choice is a pure function of the GPU, the operand types, the rank and
dropout. The entries come from compiling every kernel for every bucket and reading registers, spills
and shared memory (`tests/triton/test_ahead_of_time.py` keeps them honest), not from timings.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# The hardware's limit, said aloud: left to itself, ptxas aims at a higher occupancy and spills a
# few registers for it in some variants.
MAX_REGISTERS = 255


@dataclass(frozen=True)
class Gpu:
    """The facts about a GPU that a launcher needs."""

    capability: int  # 10 * major + minor: 80, 90, 120
    multiprocessors: int


# What CPU tensors stand for when the interpreter or a dry run passes them to a launcher.
_DEFAULT_GPU = Gpu(capability=90, multiprocessors=132)
_ASSUMED_GPU: contextvars.ContextVar[Gpu] = contextvars.ContextVar(
    "fasttune_kernels_assumed_gpu", default=_DEFAULT_GPU
)


@contextlib.contextmanager
def assume_gpu(gpu: Gpu) -> Iterator[None]:
    """Within the block, launchers configure tensors that are on no GPU as if they were on `gpu`."""
    token = _ASSUMED_GPU.set(gpu)
    try:
        yield
    finally:
        _ASSUMED_GPU.reset(token)


@functools.cache
def _cuda_gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(10 * properties.major + properties.minor, properties.multi_processor_count)


def gpu_of(tensor: Tensor) -> Gpu:
    """The GPU that holds `tensor`, or the assumed one. Reads host-side properties only."""
    return _cuda_gpu(tensor.get_device()) if tensor.is_cuda else _ASSUMED_GPU.get()


_HERE = contextlib.nullcontext()


@functools.cache
def _one_gpu() -> bool:
    return torch.cuda.device_count() == 1


def launch_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make that the device of `tensor`."""
    if not tensor.is_cuda or _one_gpu() or tensor.get_device() == torch.cuda.current_device():
        return _HERE  # entering a device costs as much as a small launch
    return torch.cuda.device(tensor.device)


@dataclass(frozen=True)
class Tile:
    """One launch configuration. `rows` is the block size along M, `columns` along N, K or V."""

    rows: int
    columns: int
    warps: int
    stages: int


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def divide_up(n: int, d: int) -> int:
    return -(-n // d)

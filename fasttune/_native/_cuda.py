"""Loads the extension module fasttune._cuda and launches its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

# A tensor stands for its address, None for a null pointer, a list for the branches of a group.
Argument = Tensor | int | float | Sequence[tuple[int | float, ...]] | None

# fasttune.testing puts the emulator here, which takes the launches on CPU tensors.
emulator: Callable[..., None] | None = None


@lru_cache(maxsize=1)
def cuda() -> ModuleType:
    """The extension module, loaded at the first use; it loads without a driver.

    Raises:
        ImportError: the extension was not built for this Python.
    """
    from fasttune import _cuda

    return _cuda


@lru_cache(maxsize=1)
def cuda_not_built() -> str | None:
    """Why the CUDA C++ kernels are absent from this installation, or None."""
    try:
        cuda()
    except ImportError as error:
        return (
            f"fasttune was built without nvcc or with FASTTUNE_CUDA=0 ({error}); building it with "
            "FASTTUNE_CUDA=1 brings nvcc"
        )
    return None


@lru_cache(maxsize=1)
def cuda_missing() -> str | None:
    """Why the CUDA C++ kernels cannot be launched, or None."""
    missing = cuda_not_built()
    if missing is not None:
        return missing
    reason: str = cuda().why_no_device()
    return reason or None


def cuda_emulated() -> bool:
    """Whether the emulator of fasttune.testing takes the launches."""
    return emulator is not None


def launch(
    name: str, device: torch.device, *args: Argument, reachable: Sequence[Tensor] = ()
) -> None:
    """Queue launcher ``name`` of csrc/bind_cuda.cpp on the current stream of ``device``.

    Args:
        reachable: tensors whose addresses stand in a table; the emulator checks accesses.

    Raises:
        RuntimeError: it cannot be launched; the message has the reason of the CUDA runtime.
    """
    if emulator is not None:
        return emulator(name, *args, reachable=reachable)
    addresses = [_address(arg) for arg in args]
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(cuda(), name)(*addresses, stream)


def _address(arg: Argument) -> Argument:
    if isinstance(arg, Tensor):
        return arg.data_ptr()
    return 0 if arg is None else arg

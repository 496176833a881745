"""The Triton tier as the hubs see it; imports triton only when it is used."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

MAX_RANK = 256  # the widest rank bucket of fasttune_kernels' tables

# fasttune.testing switches this on while the interpreter or the dry run takes CPU tensors.
accepts_cpu_tensors = False


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not(tensors: Sequence[Tensor]) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None."""
    if not _installed():
        return "triton is not installed"
    if accepts_cpu_tensors:
        return None
    if torch.version.hip is not None:
        return "the launchers pass CUDA-only options; ROCm is not supported"
    for tensor in tensors:
        if not tensor.is_cuda:
            return "it takes CUDA tensors"
    return None


@cache
def kernels(op: str) -> ModuleType:
    """The module of launchers of an op, ``fasttune_kernels.<op>``."""
    return importlib.import_module(f"fasttune_kernels.{op}")


@cache
def head_kernels() -> ModuleType:
    """The launchers that the fused head needs: those of its row loss and those of LoRA."""
    combined = ModuleType("head_kernels")
    for op in ("lora_linear", "linear_cross_entropy"):
        vars(combined).update(vars(kernels(op)))
    return combined

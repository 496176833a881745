"""Where a fused path is not faster than the original forward, and the original must run."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune import _native, _registry, _torch
from fasttune.ops import _triton
from fasttune.ops.lora_linear import LoraProjection

# Where fused is not faster than PEFT's own forward on the CPU (bench/results, lora_linear): below
# these rows the fixed cost of a call is not paid back; below _SMALL_LAYER all is fixed cost.
_MIN_ROWS = 64
TOO_FEW_ROWS = f"below {_MIN_ROWS} rows the fused path is not faster"
_MIN_ROWS_FP32_WITHOUT_DROPOUT = 1024
_SMALL_LAYER = 1 << 16
# What one kernel of torch does, ours does in as many microseconds and a few dozen more; below this
# the memory that a recipe saves is not worth them.
_MIN_ELEMENTS_OF_ONE_KERNEL = 1 << 18
# The fixed cost of a call of our attention is that of a few ten thousand scores.
_MIN_ATTENTION_SCORES = 1 << 16


def too_few_rows(x: Tensor, weight: Tensor) -> bool:
    """True if PEFT's own forward is faster for an input this small; cheap enough to ask first."""
    if not x.is_cpu or x.numel() >= _MIN_ROWS * x.shape[-1] or weight.numel() < _SMALL_LAYER:
        return False
    return _registry.forced_backend() is None


def slower_than_stock(x: Tensor, projection: LoraProjection) -> str | None:
    """Why PEFT's own forward is faster for this call, or None.

    From CPU measurements with rank 16: with dropout or a 16-bit base the fused path wins from a few
    dozen rows; in fp32 without dropout it only draws level at about 1024 rows.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return None
    if projection.weight.numel() < _SMALL_LAYER or _torch.autocast_dtype("cpu") is not None:
        return None
    rows = x.numel() // max(x.shape[-1], 1)
    limit = _MIN_ROWS_FP32_WITHOUT_DROPOUT
    if rows >= limit or any(branch.dropout_p > 0 for branch in projection.branches):
        return None
    if _registry.forced_backend() is not None:
        return None
    return f"in fp32 without dropout the fused path is not faster below {limit} rows"


def fast_backend_missing(device_type: str) -> str | None:
    """Why no backend faster than plain torch serves this device, or None if one does."""
    if _registry.forced_backend() is not None:
        return None
    if device_type == "cpu":
        return _native.cpu_missing()
    if device_type == "cuda":
        return _triton.why_not(())
    if device_type == "meta":  # shapes only: no backend runs
        return None
    return f"no kernels for device {device_type}"


def worth_replacing(operations: int, x: Tensor) -> bool:
    """True unless a module is one kernel of torch already and the input too small to gain.

    Args:
        operations: operators of torch that the module's own forward dispatches.
        x: its input.
    """
    if operations > 1 or not x.is_cpu or x.numel() >= _MIN_ELEMENTS_OF_ONE_KERNEL:
        return True
    return _registry.forced_backend() is not None


def attention_is_faster(q: Tensor, k: Tensor) -> bool:
    """True where our attention beats torch's: on the CPU, unless the call is tiny; GPUs have their
    vendor's.

    Args:
        q: [B, Hq, S, D].
        k: [B, Hk, T, D].
    """
    if q.device.type != "cpu" or type(q) is not Tensor or q.dim() != 4:
        return False
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return scores >= _MIN_ATTENTION_SCORES or _registry.forced_backend() is not None

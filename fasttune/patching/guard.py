"""Why one call of a patched module takes the original path, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fasttune import _registry, _torch
from fasttune.ops import policy
from fasttune.ops.policy import fast_backend_missing
from fasttune.patching import state
from fasttune.reason import Reason

COMPILED = Reason("torch.compile traces the original forward", expected=True)
INFERENCE = Reason("inference", expected=True)
EXTRA = Reason("called with extra arguments")
TOO_SMALL = Reason("the original forward is as fast for an input this small", expected=True)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def is_small(record: state.ModuleState, x: Any, ask: Callable[..., bool], *facts: Any) -> bool:
    """Whether the original forward is as fast for an input as small as x; counted if it is, and
    remembered: swap.py runs the original forward of inputs that are no larger.

    To be asked first: a small input takes the original forward whatever the other checks say, and
    to a small model their time is not small.

    Args:
        ask: of x and the facts; True of an input has to mean True of every smaller one of its
            dtype.
    """
    if type(x) is not Tensor or is_compiling() or not ask(x, *facts):
        return False
    if x.is_cpu:
        remember_small(record, x, x.numel())
    count_small(record)
    return True


def count_small(record: state.ModuleState) -> None:
    """A call has taken the original forward for its size."""
    record.fallbacks[TOO_SMALL.text] += 1


def remember_small(record: state.ModuleState, x: Tensor, size: Any) -> None:
    """Inputs of x's dtype and this size (their elements, their shapes, as the kind counts) are too
    small.
    """
    record.small = size, policy.limits, x.dtype


def was_small(record: state.ModuleState, x: Any, size: Any) -> bool:
    """Whether exactly this size was too small, and still is; counted if it is."""
    small = record.small
    if small is None or small[0] != size or small[1] is not policy.limits:
        return False
    if small[2] is not x.dtype or not x.is_cpu:
        return False
    if _registry.forced_backend() is not None:
        return False
    count_small(record)
    return True


def why_original(
    module: nn.Module, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Reason | None:
    """What rules out fusion whatever the kind; None if nothing does."""
    if is_compiling():
        return COMPILED
    if not module.training and not torch.is_grad_enabled():
        return INFERENCE
    if args or any(value is not None for value in kwargs.values()):
        return EXTRA
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return Reason(f"input is {type(x).__name__}, not a plain tensor")
    if x.dtype not in FLOATS:
        return Reason(f"input is {x.dtype}")
    if _torch.in_functorch():
        return Reason("called inside torch.func")
    missing = fast_backend_missing(x.device.type)
    return None if missing is None else Reason(missing)

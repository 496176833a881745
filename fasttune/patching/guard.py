"""Why one call of a patched norm, MLP, activation or attention takes the original path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttune import _torch
from fasttune.ops.policy import fast_backend_missing
from fasttune.reason import Reason

COMPILED = Reason("torch.compile traces the original forward", expected=True)
INFERENCE = Reason("inference", expected=True)
EXTRA = Reason("called with extra arguments")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def may_skip_checks(x: Any) -> bool:
    """Whether the size of x may be asked first: a small input takes the original forward whatever
    the other checks say, and to a small model their time is not small.
    """
    return type(x) is Tensor and not torch.compiler.is_compiling()


def why_original(
    module: nn.Module, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Reason | None:
    """What rules out fusion whatever the kind; None if nothing does."""
    if torch.compiler.is_compiling():
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

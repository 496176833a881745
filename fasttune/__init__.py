"""fasttune: faster, smaller parameter-efficient fine-tuning with one line, numerically proven."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fasttune._registry import BackendError, use_backend
from fasttune.allocator import tune_allocator
from fasttune.errors import PatchError, VerificationError
from fasttune.patching import (
    compare,
    explain,
    is_patched,
    mixed_adapters,
    patch,
    report,
    unpatch,
    verify,
    warmup,
)

if TYPE_CHECKING:
    from fasttune import adapters, nn, ops, optim
    from fasttune.integrations.callback import FasttuneCallback

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "FasttuneCallback",
    "PatchError",
    "VerificationError",
    "adapters",
    "compare",
    "explain",
    "is_patched",
    "mixed_adapters",
    "nn",
    "ops",
    "optim",
    "patch",
    "report",
    "tune_allocator",
    "unpatch",
    "use_backend",
    "verify",
    "warmup",
]


_PACKAGES = ("adapters", "nn", "ops", "optim")  # imported when they are first named


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"fasttune.{name}")
    if name == "FasttuneCallback":  # importing it imports transformers
        from fasttune.integrations.callback import FasttuneCallback

        return FasttuneCallback
    raise AttributeError(f"module 'fasttune' has no attribute {name!r}")

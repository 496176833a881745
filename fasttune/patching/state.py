"""What a patched module remembers about its calls, and the one place where fallbacks are
counted."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch.distributed
from torch import Tensor, nn

from fasttune.errors import PatchError
from fasttune.reason import Reason

logger = logging.getLogger("fasttune")

_ATTRIBUTE = "_fasttune_state"
_warned: set[tuple[str, str]] = set()


@dataclass
class ModuleState:
    """Run-time record of one patched module.

    Attributes:
        name: qualified name at the time of patching.
        kind: what was swapped ("lora", "loss", "norm", ...).
        plan: what the numeric proof found, for the forward of the kind.
        strict: raise PatchError at the first unexpected fallback.
        fused_calls: calls that took the fused path.
        fallbacks: calls that took the original path, by reason.
        backend: backend of the last fused call.
        saved_bytes: what the last fused call saved for backward, parameters excluded.
        mixed: the last call outside a backward was part of a mixed batch.
        small: a size that was too small for the fused path, the limits of then and the dtype
            (guard.py).
        known: what the last fused call read of the module (integrations/peft_known.py); not copied.
    """

    name: str
    kind: str
    strict: bool = False
    fused_calls: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    unexpected: set[str] = field(default_factory=set)
    backend: str = ""
    saved_bytes: int = 0
    plan: Any = None
    mixed: bool = False
    small: tuple[Any, Any, Any] | None = None
    known: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "known": None}

    @property
    def calls(self) -> int:
        """Calls so far, on either path."""
        return self.fused_calls + self.fallbacks.total()

    @property
    def path(self) -> str:
        """One of "fused", "original", or "pending" before the first call."""
        if self.fused_calls and not self.unexpected:
            return "fused"
        if self.unexpected:
            return "mixed" if self.fused_calls else "original"
        return "original" if self.fallbacks else "pending"


def attach(module: nn.Module, state: ModuleState) -> None:
    module.__dict__.setdefault(_ATTRIBUTE, {})[state.kind] = state


def detach(module: nn.Module, kind: str) -> None:
    states = module.__dict__.get(_ATTRIBUTE, {})
    states.pop(kind, None)
    if not states:
        module.__dict__.pop(_ATTRIBUTE, None)


def of(module: nn.Module, kind: str) -> ModuleState:
    state: ModuleState = module.__dict__[_ATTRIBUTE][kind]
    return state


def all_of(module: nn.Module) -> dict[str, ModuleState]:
    states: dict[str, ModuleState] = module.__dict__.get(_ATTRIBUTE, {})
    return states


def note_fused(state: ModuleState, backend: str, saved_bytes: int) -> None:
    state.fused_calls += 1
    state.backend = backend
    state.saved_bytes = saved_bytes


def note_output(state: ModuleState, output: Tensor) -> None:
    """Count a fused call by one of its outputs, whose node knows backend and saved bytes."""
    saved_bytes = int(getattr(output.grad_fn, "saved_bytes", 0))
    note_fused(state, backend_of(output) or state.backend, saved_bytes)


def backend_of(output: Tensor) -> str:
    """The backend that an output's node knows; empty without a graph."""
    node: Any = output.grad_fn
    backend = getattr(node, "backend", None)
    return backend.name if backend is not None else "dispatched" if node is not None else ""


def note_fallback(state: ModuleState, reason: Reason) -> None:
    """Count a call on the original path; warn once a reason, or raise in strict mode."""
    state.fallbacks[reason.text] += 1
    if reason.expected:
        return
    state.unexpected.add(reason.text)
    if state.strict:
        raise PatchError(f"{state.name}: the original path would run (strict=True): {reason.text}")
    if (state.kind, reason.text) not in _warned and on_first_rank():
        _warned.add((state.kind, reason.text))
        logger.warning("%s takes the original path: %s", state.name, reason.text)


def on_first_rank() -> bool:
    """True in a single process and on rank 0 of several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"

"""One call of patch: what it selects, what it swapped so far, and how that is taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fasttune.patching import state, swap
from fasttune.patching.selection import Selection

EXCLUDED = "left out by include / exclude"


@dataclass
class Session:
    """Shared by the kinds of one call of :func:`fasttune.patch`.

    Attributes:
        model: the model that is being patched.
        chosen: which names may be patched.
        strict: raise at the first call that takes the original path.
        groups: compute LoRA layers that share an input together.
        skipped: (kind, module name) -> why the module was left alone.
        proofs: results of numeric proofs, by what they depend on; modules of one class and
            configuration are proven once.
    """

    model: nn.Module
    chosen: Selection
    strict: bool
    groups: bool = True
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)
    proofs: dict[Any, Any] = field(default_factory=dict)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def skip(self, kind: str, name: str, reason: str) -> None:
        self.skipped[kind, name] = reason

    def on_undo(self, step: Callable[[], None]) -> None:
        """Register what takes a change back if a later one fails."""
        self._undo.append(step)

    def swap(self, module: nn.Module, name: str, kind: str, plan: Any = None) -> None:
        """Give the module the forward of ``kind`` and a fresh record of its calls."""
        swap.swap(module, kind)

        def take_back() -> None:
            swap.restore(module, kind)
            state.detach(module, kind)

        self.on_undo(take_back)
        record = state.ModuleState(name or type(module).__name__, kind, self.strict, plan=plan)
        state.attach(module, record)

    def candidates(self, kind: str) -> Iterator[tuple[str, nn.Module]]:
        """Modules without ``kind`` so far; those that have it get the new strictness."""
        for name, module in self.model.named_modules():
            if kind in swap.kinds_of(module):
                state.of(module, kind).strict = self.strict
            else:
                yield name, module

    def refuse(self, kind: str, name: str, module: nn.Module) -> bool:
        """Record why a module that fits cannot be swapped; False if it can."""
        if not self.chosen(name):
            self.skip(kind, name, EXCLUDED)
        elif "forward" in module.__dict__:
            self.skip(kind, name, "an instance-level forward is installed")
        else:
            return False
        return True

    def take_back(self) -> None:
        """Undo every change of this call, the last one first."""
        for step in reversed(self._undo):
            step()

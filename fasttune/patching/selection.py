"""Which modules a call of patch may touch, by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fasttune.patching import state


class Selection:
    """Names as PEFT's target_modules: the full name or an ending of it at a dot.

    Raises:
        TypeError: a name is no string.
    """

    def __init__(
        self, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
    ) -> None:
        self.include = _names("include", include)
        self.exclude = _names("exclude", exclude)

    def __call__(self, name: str) -> bool:
        if self.exclude is not None and _matches(name, self.exclude):
            return False
        return self.include is None or _matches(name, self.include)

    def warn_of_unknown_names(self, model: nn.Module) -> None:
        """Log every include or exclude pattern that fits no module of the model."""
        names = [name for name, _ in model.named_modules()]
        for argument, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns or ():
                if not any(_matches(name, [pattern]) for name in names):
                    state.logger.warning("%s: no module is named %r", argument, pattern)


def _names(argument: str, value: str | Sequence[str] | None) -> list[str] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else list(value)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument}: expected module names, got {type(name).__name__}")
    return names


def _matches(name: str, patterns: list[str]) -> bool:
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)

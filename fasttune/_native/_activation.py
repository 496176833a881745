"""The codes of the activations in C++."""

from __future__ import annotations

from functools import lru_cache

from fasttune._native._extension import cpu


@lru_cache(maxsize=1)
def activation_codes() -> dict[str, int]:
    """Name -> code, as csrc/common/activation.h numbers them."""
    return {name: code for code, name in enumerate(cpu().ACTIVATIONS)}

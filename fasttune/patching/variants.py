"""What verify replays of a fused layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Variants:
    """One layer computed in three ways; each maps (x, leaves) to its output.

    Attributes:
        leaves: the trained parameters by name.
        fused, stock: of the leaves in their dtypes.
        truth: of fp64 copies of x and the leaves.
        depth: terms of the longest sum in forward or backward.
        x: what stands for the layer's input, if not that itself.
    """

    leaves: dict[str, Tensor]
    fused: Callable[[Tensor, Sequence[Tensor]], Tensor]
    stock: Callable[[Tensor, Sequence[Tensor]], Tensor]
    truth: Callable[[Tensor, Sequence[Tensor]], Tensor]
    depth: int
    x: Tensor | None = None

"""The errors that patching and verifying raise."""

from __future__ import annotations


class PatchError(RuntimeError):
    """The model cannot be patched as asked; it is as it was before the call."""


class VerificationError(AssertionError):
    """A patched model does not compute what the stock model computes.

    Attributes:
        layer: name of the layer, or "" for the whole step.
        tensor: what differs: "output", "loss", "gradient of <parameter>", ...
        error: the largest deviation found.
        allowed: the largest deviation allowed.
    """

    def __init__(self, layer: str, tensor: str, error: float, allowed: float) -> None:
        self.layer, self.tensor, self.error, self.allowed = layer, tensor, error, allowed
        where = f"{layer}: " if layer else ""
        super().__init__(f"{where}{tensor} deviates by {error:.3e}, allowed is {allowed:.3e}")

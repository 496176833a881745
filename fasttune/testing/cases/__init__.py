"""Conformance cases, one file an op."""

from fasttune.testing.cases import linear_cross_entropy, lora_linear
from fasttune.testing.conformance import Case

ALL: list[Case] = [*lora_linear.CASES, *linear_cross_entropy.CASES]

__all__ = ["ALL"]

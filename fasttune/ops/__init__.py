"""The ops: public functions on plain tensors, differentiable, with one implementation per
backend."""

from fasttune.ops._row_loss import CrossEntropy
from fasttune.ops.linear_cross_entropy import TokenStats, linear_cross_entropy
from fasttune.ops.lora_linear import LoraBranch, LoraProjection, lora_linear, lora_linear_group

__all__ = [
    "CrossEntropy",
    "LoraBranch",
    "LoraProjection",
    "TokenStats",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linear_group",
]

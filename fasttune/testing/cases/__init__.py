"""Conformance cases, one file an op."""

from fasttune.testing.cases import (
    attention,
    bias_activation,
    bottleneck,
    dora_linear,
    glu,
    ia3_scale,
    layer_norm,
    linear_cross_entropy,
    linear_log_probs,
    lora_embedding,
    lora_linear,
    lora_segmented,
    reft,
    rms_norm,
    rope,
    scaled_glu,
)
from fasttune.testing.conformance import Case

_OPS = (
    lora_linear,
    lora_embedding,
    dora_linear,
    lora_segmented,
    linear_cross_entropy,
    linear_log_probs,
    rms_norm,
    layer_norm,
    glu,
    bias_activation,
    bottleneck,
    ia3_scale,
    scaled_glu,
    reft,
    rope,
    attention,
)
ALL: list[Case] = [case for op in _OPS for case in op.CASES]

__all__ = ["ALL"]

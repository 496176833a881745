"""The ops: public functions on plain tensors, differentiable, with one implementation per
backend."""

from fasttune.ops._row_loss import CrossEntropy
from fasttune.ops.adamw import adamw_step, limit_norms, sum_of_squares
from fasttune.ops.attention import attention
from fasttune.ops.bias_activation import bias_activation
from fasttune.ops.bottleneck import bottleneck
from fasttune.ops.dora_linear import dora_linear, dora_weight_norm
from fasttune.ops.glu import glu
from fasttune.ops.ia3_scale import ia3_scale
from fasttune.ops.layer_norm import add_layer_norm, layer_norm
from fasttune.ops.linear_cross_entropy import TokenStats, linear_cross_entropy
from fasttune.ops.linear_log_probs import linear_log_probs
from fasttune.ops.lora_embedding import lora_embedding
from fasttune.ops.lora_linear import LoraBranch, LoraProjection, lora_linear, lora_linear_group
from fasttune.ops.lora_segmented import lora_segmented
from fasttune.ops.reft import reft
from fasttune.ops.replaced_rows import embedding_with_rows, linear_with_rows
from fasttune.ops.rms_norm import add_rms_norm, rms_norm
from fasttune.ops.rope import rope
from fasttune.ops.scaled_glu import scaled_glu

__all__ = [
    "CrossEntropy",
    "LoraBranch",
    "LoraProjection",
    "TokenStats",
    "adamw_step",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bias_activation",
    "bottleneck",
    "dora_linear",
    "dora_weight_norm",
    "embedding_with_rows",
    "glu",
    "ia3_scale",
    "layer_norm",
    "limit_norms",
    "linear_cross_entropy",
    "linear_log_probs",
    "linear_with_rows",
    "lora_embedding",
    "lora_linear",
    "lora_linear_group",
    "lora_segmented",
    "reft",
    "rms_norm",
    "rope",
    "scaled_glu",
    "sum_of_squares",
]

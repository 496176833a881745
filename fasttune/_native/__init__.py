"""The C++ kernels: validates tensors and passes their addresses. Nothing else calls ``data_ptr``.

The primitives carry the names and arguments of ``fasttune_kernels`` (docs/design.md states them),
plus ``addend`` where a C++ kernel folds the product of the base layer into its single rounding.
One file an op.
"""

from fasttune._native._cuda import cuda, cuda_emulated, cuda_missing, cuda_not_built
from fasttune._native._extension import (
    convert,
    cpu,
    cpu_missing,
    free_scratch,
    scratch,
)
from fasttune._native.adamw import adamw_step, limit_norms, sums_of_squares
from fasttune._native.attention import MAX_WIDTH, attention_backward, attention_forward
from fasttune._native.base_product import deep_product, has_base_product, takes_product
from fasttune._native.bias_activation import (
    bias_activation_backward,
    bias_activation_forward,
    column_sum,
)
from fasttune._native.bottleneck import (
    bottleneck_backward,
    bottleneck_forward,
    takes_bottleneck,
)
from fasttune._native.glu import glu_backward, glu_forward
from fasttune._native.ia3_scale import ia3_scale_backward
from fasttune._native.layer_norm import (
    add_layer_norm_forward,
    layer_norm_backward,
    layer_norm_forward,
)
from fasttune._native.linear_cross_entropy import cross_entropy_rows_
from fasttune._native.lora_linear import (
    MAX_RANK,
    drop,
    lora_down,
    lora_down_backward,
    lora_layer,
    lora_up,
    lora_up_backward,
)
from fasttune._native.lora_runs import Branches, runs_backward, runs_forward, takes_runs
from fasttune._native.reft import reft_backward, reft_forward
from fasttune._native.rms_norm import add_rms_norm_forward, rms_norm_backward, rms_norm_forward
from fasttune._native.rope import rope_backward, rope_forward
from fasttune._native.row_norms import row_norms, takes_few_rows, takes_row_norms
from fasttune._native.scaled_glu import scaled_glu_backward, scaled_glu_forward
from fasttune._native.scaled_sum import scaled_sum

__all__ = [
    "MAX_RANK",
    "MAX_WIDTH",
    "Branches",
    "adamw_step",
    "add_layer_norm_forward",
    "add_rms_norm_forward",
    "attention_backward",
    "attention_forward",
    "bias_activation_backward",
    "bias_activation_forward",
    "bottleneck_backward",
    "bottleneck_forward",
    "column_sum",
    "convert",
    "cpu",
    "cpu_missing",
    "cross_entropy_rows_",
    "cuda",
    "cuda_emulated",
    "cuda_missing",
    "cuda_not_built",
    "deep_product",
    "drop",
    "free_scratch",
    "glu_backward",
    "glu_forward",
    "has_base_product",
    "ia3_scale_backward",
    "layer_norm_backward",
    "layer_norm_forward",
    "limit_norms",
    "lora_down",
    "lora_down_backward",
    "lora_layer",
    "lora_up",
    "lora_up_backward",
    "reft_backward",
    "reft_forward",
    "rms_norm_backward",
    "rms_norm_forward",
    "rope_backward",
    "rope_forward",
    "row_norms",
    "runs_backward",
    "runs_forward",
    "scaled_glu_backward",
    "scaled_glu_forward",
    "scaled_sum",
    "scratch",
    "sums_of_squares",
    "takes_bottleneck",
    "takes_few_rows",
    "takes_product",
    "takes_row_norms",
    "takes_runs",
]

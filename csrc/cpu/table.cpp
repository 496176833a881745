// The table of one build; compiled once per instruction set.
#include "adamw.h"
#include "attention.h"
#include "bias_activation.h"
#include "bottleneck.h"
#include "glu.h"
#include "ia3_scale.h"
#include "layer_norm.h"
#include "linear_cross_entropy.h"
#include "lora_linear.h"
#include "reft.h"
#include "rms_norm.h"
#include "rope.h"
#include "row_norms.h"
#include "scaled_glu.h"
#include "scaled_sum.h"
#include "simd.h"

namespace fasttune::cpu::FASTTUNE_ISA {

const Kernels& table() {
  static const Kernels kernels{FASTTUNE_STRINGIFY(FASTTUNE_ISA),
                               convert,
                               transpose,
                               lora_reduce,
                               lora_outer,
                               draw,
                               drop,
                               lora_expand,
                               nullptr,  // base_product
                               nullptr,  // deep_product
                               bottleneck_forward,
                               bottleneck_backward,
                               scaled_sum,
                               ia3_scale_backward,
                               row_norms,
                               scaled_glu_forward,
                               scaled_glu_backward,
                               reft_forward,
                               reft_backward,
                               cross_entropy_rows,
                               glu_forward,
                               glu_backward,
                               bias_activation_forward,
                               bias_activation_backward,
                               column_sum,
                               attention_forward,
                               attention_backward,
                               rope,
                               rms_norm_forward,
                               rms_norm_backward,
                               layer_norm_forward,
                               layer_norm_backward,
                               sums_of_squares,
                               adamw_step,
                               limit_norms};
  return kernels;
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

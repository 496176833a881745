// The kernels of AVX-512, with those that tiles make faster in their place.
#include "amx/lora_linear.h"
#include "attention.h"
#include "bottleneck.h"
#include "row_norms.h"
#include "simd.h"

namespace fasttune::cpu::FASTTUNE_ISA {

const Kernels& table() {
  static const Kernels kernels = [] {
    Kernels own = avx512::table();
    own.isa = FASTTUNE_STRINGIFY(FASTTUNE_ISA);
    own.lora_reduce = lora_reduce;
    own.lora_outer = lora_outer;
    own.lora_expand = lora_expand;
    own.base_product = base_product;
    own.deep_product = deep_product;
    own.row_norms = row_norms;
    own.bottleneck_forward = bottleneck_forward;
    own.bottleneck_backward = bottleneck_backward;
    own.attention_forward = attention_forward;
    own.attention_backward = attention_backward;
    return own;
  }();
  return kernels;
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

// The kernels of AVX-512, with attention by dot products of bf16 pairs.
#include "attention.h"
#include "simd.h"

namespace fasttune::cpu::FASTTUNE_ISA {

const Kernels& table() {
  static const Kernels kernels = [] {
    Kernels own = avx512::table();
    own.isa = FASTTUNE_STRINGIFY(FASTTUNE_ISA);
    own.attention_forward = attention_forward;
    own.attention_backward = attention_backward;
    return own;
  }();
  return kernels;
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

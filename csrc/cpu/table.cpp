// The table of one build; compiled once per instruction set.
#include "linear_cross_entropy.h"
#include "lora_linear.h"
#include "simd.h"

namespace fasttune::cpu::FASTTUNE_ISA {

const Kernels& table() {
  static const Kernels kernels{FASTTUNE_STRINGIFY(FASTTUNE_ISA),
                               convert,
                               lora_reduce,
                               lora_outer,
                               lora_expand,
                               cross_entropy_rows};
  return kernels;
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

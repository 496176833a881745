// Rotary position embedding and its transpose; kernels.h states what it computes.
#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void rope(const RopeOperand* operands, int64_t count, const RopeTables& tables,
          const RopeShape& shape, int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

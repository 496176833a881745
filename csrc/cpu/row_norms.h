// Norms of rows; kernels.h states what they are.
#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void row_norms(const Matrix& w, const float* panel, int64_t rank, const float* b,
               const float* through, float scale, float* out, int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

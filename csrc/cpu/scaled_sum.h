// The end of a bottleneck adapter; kernels.h states what it computes.
#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void scaled_sum(const Matrix& x, const Matrix* addend, const float* column_scale, float scale,
                const Dropout& dropout, const MutableMatrix& out, int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

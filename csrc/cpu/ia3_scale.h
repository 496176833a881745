// The gradients of y = x scale; kernels.h states what they are.
#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void ia3_scale_backward(const Matrix& dy, const Matrix& x, const float* scale,
                        const MutableMatrix* dx, const ColumnSums& dscale, int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

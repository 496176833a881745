// y = act(gate) * up * scale and its gradients; kernels.h states what each computes.
#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void scaled_glu_forward(const Matrix& gate, const Matrix& up, const float* scale,
                        const MutableMatrix& y, Activation activation, int threads);
void scaled_glu_backward(const Matrix& dy, const Matrix& gate, const Matrix& up, const float* scale,
                         const MutableMatrix& dgate, const MutableMatrix& dup,
                         const ColumnSums& dscale, Activation activation, int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

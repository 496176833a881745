// y = act(x + bias) and its gradients; kernels.h states what each computes.
#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void bias_activation_forward(const Matrix& x, const float* bias, const MutableMatrix& y,
                             Activation activation, int threads);
void bias_activation_backward(const Matrix& dy, const Matrix& x, const float* bias,
                              const MutableMatrix& dx, Activation activation, int threads);
void column_sum(const Matrix& x, float* partial, float* out, int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

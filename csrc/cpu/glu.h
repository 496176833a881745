// y = act(gate) * up and its gradients; kernels.h states what each computes.
#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void glu_forward(const Matrix& gate, const Matrix& up, const MutableMatrix& y,
                 Activation activation, int threads);
void glu_backward(const Matrix& dy, const Matrix& gate, const Matrix& up,
                  const MutableMatrix& dgate, const MutableMatrix& dup, Activation activation,
                  int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

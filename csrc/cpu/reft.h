// Edits of listed rows within a low-rank subspace; kernels.h states what each computes.
#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void reft_forward(const Matrix& h, const ReftCall& call, const MutableMatrix& y,
                  const MutableMatrix* x, float* z, float* d, int threads);
void reft_backward(const Matrix& dy, const ReftCall& call, const float* z, const MutableMatrix* dh,
                   const MutableMatrix* g, float* dz, float* dd, int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

// RMS normalisation of rows; kernels.h states what each function computes.
#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void rms_norm_forward(const Matrix& x, const Matrix* residual, const MutableMatrix* sum,
                      const NormVector& weight, double eps, bool round_first,
                      const MutableMatrix& y, float* rstd, int threads);
void rms_norm_backward(const Matrix& dy, const Matrix& x, const NormVector& weight,
                       const float* rstd, const Matrix* addend, const MutableMatrix* dx,
                       const ColumnSums& dweight, int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

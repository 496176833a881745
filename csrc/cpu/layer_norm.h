// Layer normalisation of rows; kernels.h states what each function computes.
#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void layer_norm_forward(const Matrix& x, const Matrix* residual, const MutableMatrix* sum,
                        const NormVector& weight, const NormVector& bias, double eps,
                        const MutableMatrix& y, float* mean, float* rstd, int threads);
void layer_norm_backward(const Matrix& dy, const Matrix& x, const NormVector& weight,
                         const float* mean, const float* rstd, const Matrix* addend,
                         const MutableMatrix* dx, const ColumnSums& dweight,
                         const ColumnSums& dbias, int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

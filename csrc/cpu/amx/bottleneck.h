#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void bottleneck_forward(const Bottleneck& adapter, const Matrix* residual, const Matrix* up_bias,
                        const Matrix* scale, const MutableMatrix& z, const MutableMatrix& y,
                        int threads);
void bottleneck_backward(const Bottleneck& adapter, const Matrix& dy, const Matrix& z,
                         const Matrix* addend, float outer_factor,
                         const BottleneckGradients& gradients, int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

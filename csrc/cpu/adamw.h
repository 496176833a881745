// AdamW with decoupled weight decay over many tensors; kernels.h states what it computes.
#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void sums_of_squares(const AdamWAddresses* tensors, int64_t count, DType dtype, double* out,
                     int threads);
void adamw_step(const AdamWAddresses* tensors, const AdamWFacts* facts, int64_t count,
                const AdamWCall& call, double* norms, int threads);
void limit_norms(const AdamWLimit* tensors, const float* norms, int64_t count, DType dtype,
                 Rounding rounding, int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

// Scaled dot-product attention with grouped-query heads; kernels.h states what each computes.
#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void attention_forward(const AttentionInputs& inputs, const MutableHeads& out, float* row_maximum,
                       float* row_sum, float* scratch, int threads);
void attention_backward(const AttentionInputs& inputs, const AttentionResults& results,
                        const AttentionGradients& gradients, float* scratch, int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

// The per-row loss of linear_cross_entropy; kernels.h states what it computes.
#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void cross_entropy_rows(const MutableMatrix& logits, const int64_t* targets,
                        const RowLossOptions& options, const RowLossOutputs& outputs, int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

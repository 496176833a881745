#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void lora_reduce(const Matrix& x, const float* panel, int64_t rank, float scale,
                 const Dropout& dropout, float* out, int threads);
void lora_outer(const Matrix& x, const float* t, int64_t rank, const Dropout& dropout,
                const MutableMatrix& out, bool transposed, int threads);
void lora_expand(const float* t, const float* panel, int64_t rank, const ExpandTerms& terms,
                 const Dropout& dropout, const MutableMatrix& out, int threads);
void base_product(const Matrix& x, const Matrix& w, bool transposed, const Run* runs, int64_t count,
                  const Matrix* addend, const ScaledProduct* product, const MutableMatrix& out,
                  int threads);
void deep_product(const Matrix& x, const Matrix& w, bool transposed, const MutableMatrix& out,
                  float* partial, int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

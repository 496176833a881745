// The three matrix products around a LoRA branch; kernels.h states what each computes.
#pragma once

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void convert(const Matrix& src, const MutableMatrix& dst, int threads);
void transpose(const Matrix& src, float* dst, int64_t stride, int threads);
void lora_reduce(const Matrix& x, const float* panel, int64_t rank, float scale,
                 const Dropout& dropout, float* out, int threads);
void lora_outer(const Matrix& x, const float* t, int64_t rank, const Dropout& dropout,
                const MutableMatrix& out, bool transposed, int threads);
void draw(const Dropout& dropout, int64_t rows, int64_t cols, uint64_t* bits, int threads);
void drop(const Matrix& x, const Dropout& dropout, const MutableMatrix& out, int threads);
void lora_expand(const float* t, const float* panel, int64_t rank, const ExpandTerms& terms,
                 const Dropout& dropout, const MutableMatrix& out, int threads);

}  // namespace fasttune::cpu::FASTTUNE_ISA

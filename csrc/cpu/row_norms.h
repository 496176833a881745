// Norms of rows; kernels.h states what they are.
#pragma once

#include <cmath>

#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

void row_norms(const Matrix& w, const float* panel, int64_t rank, const float* b,
               const float* through, float scale, float* out, const Matrix* x,
               const MutableMatrix* product, int threads);

// The norm of row n, of its squares and its cross products w_n panel; a NaN stays one.
inline float row_norm(double squares, const float* cross, const float* b, const float* through,
                      int64_t n, int64_t rank, float scale) {
  double products = 0;
  for (int64_t r = 0; r < rank; ++r)
    products += static_cast<double>(b[n * rank + r]) * (2.0f * cross[r] + through[n * rank + r]);
  const double sum = squares + scale * products;
  return static_cast<float>(std::sqrt(sum < 0 ? 0 : sum));
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

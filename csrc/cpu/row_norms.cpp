#include "row_norms.h"

#include <cmath>
#include <memory>

#include "lora_linear.h"
#include "norm_rows.h"

// Floor: w is read once; 2 R + 2 operations an element, R = 16: memory and arithmetic are even. A
// block of rows comes back for its squares from the second-level cache.
namespace fasttune::cpu::FASTTUNE_ISA {

void row_norms(const Matrix& w, const float* panel, int64_t rank, const float* b,
               const float* through, float scale, float* out, int threads) {
  constexpr int64_t kBlockBytes = 1 << 19, kRows = 8;
  const int64_t bytes = std::max<int64_t>(1, w.cols * size_of(w.dtype));
  const int64_t size = std::max(kRows, kBlockBytes / bytes / kRows * kRows);
  const int64_t blocks = (w.rows + size - 1) / size;
  with_element(w.dtype, [&](auto element) {
    using E = decltype(element);
    const auto* data = static_cast<const typename E::type*>(w.data);
#pragma omp parallel num_threads(norm_team(threads, w.rows, w.cols))
    {
      const std::unique_ptr<float[]> cross(new float[size * rank]);
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * size, count = std::min(size, w.rows - first);
        const auto* rows = data + first * w.stride;
        lora_reduce({rows, count, w.cols, w.stride, w.dtype}, panel, rank, 1.0f, Dropout{},
                    cross.get(), 1);
        for (int64_t i = 0; i < count; ++i) {
          const double squares = sum_columns<1>(w.cols, [&](int64_t j, auto lanes, auto& sums) {
            const vr v = load_lanes(element, rows + i * w.stride + j, lanes);
            sums[0] += v * v;
          })[0];
          const float* own = cross.get() + i * rank;
          const int64_t at = (first + i) * rank;
          const double products = sum_columns<1>(rank, [&](int64_t r, auto lanes, auto& sums) {
            const vr twice = load_lanes(Float{}, own + r, lanes) * all(2.0f);
            sums[0] += load_lanes(Float{}, b + at + r, lanes) *
                       (twice + load_lanes(Float{}, through + at + r, lanes));
          })[0];
          const double sum = squares + static_cast<double>(scale) * products;
          out[first + i] = static_cast<float>(std::sqrt(sum < 0 ? 0 : sum));  // a NaN stays one
        }
      }
    }
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

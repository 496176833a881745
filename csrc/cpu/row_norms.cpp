#include "row_norms.h"

#include <memory>

#include "lora_linear.h"
#include "norm_rows.h"

// Floor: w is read once; 2 (R + M) + 2 operations an element, R = 16, M = 0: memory and arithmetic
// are even. A block of rows comes back for its squares from the second-level cache.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

// The panels of A and x side by side, [K, padded_rank(R) + padded_rank(M)].
class Panels {
 public:
  Panels(const float* panel, int64_t rank, const Matrix* x, int64_t depth, int threads)
      : first_of_x(padded_rank(rank)), count(x ? first_of_x + x->rows : rank), data_(panel) {
    if (!x) return;
    const int64_t few = padded_rank(x->rows), width = first_of_x + few;
    const std::unique_ptr<float[]> other(new float[depth * few]);
    transpose(*x, other.get(), few, threads);
    own_.reset(new float[depth * width]);
    for (int64_t k = 0; k < depth; ++k) {
      std::copy_n(panel + k * first_of_x, first_of_x, own_.get() + k * width);
      std::copy_n(other.get() + k * few, few, own_.get() + k * width + first_of_x);
    }
    data_ = own_.get();
  }
  const float* data() const { return data_; }

  const int64_t first_of_x, count;  // columns

 private:
  const float* data_;
  std::unique_ptr<float[]> own_;
};

// product[m, first + i] = found[i * step + m]
void put_product(const float* found, int64_t step, int64_t first, int64_t count,
                 const MutableMatrix& product) {
  with_element(product.dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t m = 0; m < product.rows; ++m) {
      auto* to = static_cast<typename E::type*>(product.data) + m * product.stride + first;
      for (int64_t i = 0; i < count; ++i) E::store_one(to + i, found[i * step + m]);
    }
  });
}

}  // namespace

void row_norms(const Matrix& w, const float* panel, int64_t rank, const float* b,
               const float* through, float scale, float* out, const Matrix* x,
               const MutableMatrix* product, int threads) {
  constexpr int64_t kBlockBytes = 1 << 19, kRows = 8;
  const int64_t bytes = std::max<int64_t>(1, w.cols * size_of(w.dtype));
  const int64_t size = std::max(kRows, kBlockBytes / bytes / kRows * kRows);
  const int64_t blocks = (w.rows + size - 1) / size;
  const Panels panels(panel, rank, x, w.cols, threads);
  with_element(w.dtype, [&](auto element) {
    using E = decltype(element);
    const auto* data = static_cast<const typename E::type*>(w.data);
#pragma omp parallel num_threads(norm_team(threads, w.rows, w.cols))
    {
      const std::unique_ptr<float[]> found(new float[size * panels.count]);
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * size, count = std::min(size, w.rows - first);
        const auto* rows = data + first * w.stride;
        lora_reduce({rows, count, w.cols, w.stride, w.dtype}, panels.data(), panels.count, 1.0f,
                    Dropout{}, found.get(), 1);
        for (int64_t i = 0; i < count; ++i) {
          const double squares = sum_columns<1>(w.cols, [&](int64_t j, auto lanes, auto& sums) {
            const vr v = load_lanes(element, rows + i * w.stride + j, lanes);
            sums[0] += v * v;
          })[0];
          out[first + i] =
              row_norm(squares, found.get() + i * panels.count, b, through, first + i, rank, scale);
        }
        if (x) put_product(found.get() + panels.first_of_x, panels.count, first, count, *product);
      }
    }
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

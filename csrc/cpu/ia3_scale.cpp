#include "ia3_scale.h"

#include "norm_rows.h"

// Floor per element in 16 bits: 4 bytes of dy and x read and 2 of dx written, against three
// operations: memory binds.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

constexpr int64_t kColumns = 1024;  // of a piece: its scale and sums stay in the first-level cache

// Columns [col, col + cols) of some rows.
template <typename G, typename X>
struct Backward {
  const Matrix& dy;
  const Matrix& x;
  const float* scale;       // [N]
  const MutableMatrix* dx;  // of the dtype of dy; null: not wanted
  float* dscale;            // [N], added to
  int64_t col, cols;

  template <int Rows>
  void rows(int64_t first) const {
    using Grad = typename G::type;
    const Grad* grad = static_cast<const Grad*>(dy.data) + first * dy.stride + col;
    const auto* in = static_cast<const typename X::type*>(x.data) + first * x.stride + col;
    Grad* out = dx ? static_cast<Grad*>(dx->data) + first * dx->stride + col : nullptr;
    for_columns(cols, [&](int64_t j, auto lanes) {
      const vr w = load_lanes(Float{}, scale + col + j, lanes);
      vr sums = load_lanes(Float{}, dscale + col + j, lanes);
      for (int i = 0; i < Rows; ++i) {
        const vr g = load_lanes(G{}, grad + i * dy.stride + j, lanes);
        sums += g * load_lanes(X{}, in + i * x.stride + j, lanes);
        if (out) store_lanes(G{}, out + i * dx->stride + j, g * w, lanes);
      }
      store_lanes(Float{}, dscale + col + j, sums, lanes);
    });
  }
};

}  // namespace

void ia3_scale_backward(const Matrix& dy, const Matrix& x, const float* scale,
                        const MutableMatrix* dx, const ColumnSums& dscale, int threads) {
  const int64_t chunks = dscale.chunks, size = chunks ? (x.rows + chunks - 1) / chunks : 0;
  const int64_t pieces = (x.cols + kColumns - 1) / kColumns;
  with_element(dy.dtype, [&](auto gradient) {
    with_element(x.dtype, [&](auto in) {
#pragma omp parallel for num_threads(norm_team(threads, x.rows, x.cols)) schedule(static)
      for (int64_t task = 0; task < chunks * pieces; ++task) {
        const int64_t chunk = task / pieces, col = task % pieces * kColumns;
        const int64_t cols = std::min(kColumns, x.cols - col);
        float* sums = dscale.partial + chunk * x.cols;
        std::fill(sums + col, sums + col + cols, 0.0f);
        const Backward<decltype(gradient), decltype(in)> body{dy, x, scale, dx, sums, col, cols};
        for_row_blocks(std::min(chunk * size, x.rows), std::min((chunk + 1) * size, x.rows), cols,
                       body);
      }
    });
  });
  add_partials(dscale, x.cols, threads);
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

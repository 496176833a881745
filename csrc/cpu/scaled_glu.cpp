#include "scaled_glu.h"

#include "elementwise.h"
#include "norm_rows.h"

// Floor per element in 16 bits: as glu.cpp, 6 bytes forward and 10 backward; the scale and its sums
// stay in the first-level cache.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

constexpr int64_t kColumns = 1024;  // of a piece

template <typename A, typename E>
void forward_piece(const void* const* in, void* const* out, int64_t vectors) {
  const auto* gate = static_cast<const typename E::type*>(in[0]);
  const auto* up = static_cast<const typename E::type*>(in[1]);
  const auto* scale = static_cast<const float*>(in[Elementwise::kInputs]);
  auto* y = static_cast<typename E::type*>(out[0]);
  using R = Register<E>;
  for (int64_t j = 0; j < vectors * kLanes; j += kRegisterLanes)
    R::store(y + j, A::value(R::load(gate + j)) * R::load(up + j) * read<vr>(scale + j));
}

// Columns [col, col + cols) of some rows.
template <typename A, typename E>
struct Backward {
  const Matrix& dy;
  const Matrix& gate;
  const Matrix& up;
  const float* scale;          // [I]
  const MutableMatrix& dgate;  // null data: not wanted
  const MutableMatrix& dup;    // likewise
  float* dscale;               // [I], added to; null: not wanted
  int64_t col, cols;

  using Value = typename E::type;

  static const Value* at(const Matrix& m, int64_t row, int64_t col) {
    return static_cast<const Value*>(m.data) + row * m.stride + col;
  }
  static Value* at(const MutableMatrix& m, int64_t row, int64_t col) {
    return m.data ? static_cast<Value*>(m.data) + row * m.stride + col : nullptr;
  }

  template <int Rows>
  void rows(int64_t first) const {
    const Value *grad = at(dy, first, col), *g = at(gate, first, col), *u = at(up, first, col);
    Value *out_gate = at(dgate, first, col), *out_up = at(dup, first, col);
    for_columns(cols, [&](int64_t j, auto lanes) {
      const vr w = load_lanes(Float{}, scale + col + j, lanes);
      vr sums = dscale ? load_lanes(Float{}, dscale + col + j, lanes) : all(0.0f);
      for (int i = 0; i < Rows; ++i) {
        const vr d = load_lanes(E{}, grad + i * dy.stride + j, lanes);
        const vr v = load_lanes(E{}, u + i * up.stride + j, lanes);
        const Jet a = A::jet(load_lanes(E{}, g + i * gate.stride + j, lanes));
        sums += d * (a.value * v);
        if (out_gate) store_lanes(E{}, out_gate + i * dgate.stride + j, d * w * v * a.slope, lanes);
        if (out_up) store_lanes(E{}, out_up + i * dup.stride + j, d * w * a.value, lanes);
      }
      if (dscale) store_lanes(Float{}, dscale + col + j, sums, lanes);
    });
  }
};

}  // namespace

void scaled_glu_forward(const Matrix& gate, const Matrix& up, const float* scale,
                        const MutableMatrix& y, Activation activation, int threads) {
  const Elementwise call{y.rows, y.cols, {gate, up}, {y}, scale};
  const auto kernels = call.kernels(activation, [](auto act, auto element) {
    return &forward_piece<decltype(act), decltype(element)>;
  });
  call.run(kernels, threads);
}

void scaled_glu_backward(const Matrix& dy, const Matrix& gate, const Matrix& up, const float* scale,
                         const MutableMatrix& dgate, const MutableMatrix& dup,
                         const ColumnSums& dscale, Activation activation, int threads) {
  const int64_t chunks = dscale.chunks, size = chunks ? (dy.rows + chunks - 1) / chunks : 0;
  const int64_t pieces = (dy.cols + kColumns - 1) / kColumns;
  with_activation(activation, [&](auto act) {
    with_element(dy.dtype, [&](auto element) {
#pragma omp parallel for num_threads(norm_team(threads, dy.rows, dy.cols)) schedule(static)
      for (int64_t task = 0; task < chunks * pieces; ++task) {
        const int64_t chunk = task / pieces, col = task % pieces * kColumns;
        const int64_t cols = std::min(kColumns, dy.cols - col);
        float* sums = dscale.out ? dscale.partial + chunk * dy.cols : nullptr;
        if (sums) std::fill(sums + col, sums + col + cols, 0.0f);
        const Backward<decltype(act), decltype(element)> body{dy,  gate, up,  scale, dgate,
                                                              dup, sums, col, cols};
        for_row_blocks(std::min(chunk * size, dy.rows), std::min((chunk + 1) * size, dy.rows), cols,
                       body);
      }
    });
  });
  add_partials(dscale, dy.cols, threads);
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

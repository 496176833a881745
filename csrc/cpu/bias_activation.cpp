#include "bias_activation.h"

#include <algorithm>

#include "elementwise.h"

// Floor per element in 16 bits: forward reads 2 bytes and writes 2, backward reads 4 and writes 2,
// the column sum reads 2; the bias stays in the first-level cache. Arithmetic as in glu.cpp.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

template <typename E>
inline vr biased(const typename E::type* x, const float* bias, int64_t j) {
  const vr value = Register<E>::load(x + j);
  return bias ? value + read<vr>(bias + j) : value;
}

template <typename A, typename E>
void forward_piece(const void* const* in, void* const* out, int64_t vectors) {
  const auto* x = static_cast<const typename E::type*>(in[0]);
  const auto* bias = static_cast<const float*>(in[Elementwise::kInputs]);
  auto* y = static_cast<typename E::type*>(out[0]);
  for (int64_t j = 0; j < vectors * kLanes; j += kRegisterLanes)
    Register<E>::store(y + j, A::value(biased<E>(x, bias, j)));
}

template <typename A, typename E>
void backward_piece(const void* const* in, void* const* out, int64_t vectors) {
  const auto* dy = static_cast<const typename E::type*>(in[0]);
  const auto* x = static_cast<const typename E::type*>(in[1]);
  const auto* bias = static_cast<const float*>(in[Elementwise::kInputs]);
  auto* dx = static_cast<typename E::type*>(out[0]);
  for (int64_t j = 0; j < vectors * kLanes; j += kRegisterLanes)
    Register<E>::store(dx + j, Register<E>::load(dy + j) * A::jet(biased<E>(x, bias, j)).slope);
}

}  // namespace

void bias_activation_forward(const Matrix& x, const float* bias, const MutableMatrix& y,
                             Activation activation, int threads) {
  const Elementwise call{y.rows, y.cols, {x}, {y}, bias};
  const auto kernels = call.kernels(activation, [](auto act, auto element) {
    return &forward_piece<decltype(act), decltype(element)>;
  });
  call.run(kernels, threads);
}

void bias_activation_backward(const Matrix& dy, const Matrix& x, const float* bias,
                              const MutableMatrix& dx, Activation activation, int threads) {
  const Elementwise call{dx.rows, dx.cols, {dy, x}, {dx}, bias};
  const auto kernels = call.kernels(activation, [](auto act, auto element) {
    return &backward_piece<decltype(act), decltype(element)>;
  });
  call.run(kernels, threads);
}

// A block of rows adds into its own partial sums, row after row; a second pass adds the blocks in
// order. Both orders follow from the shape alone.
void column_sum(const Matrix& x, float* partial, float* out, int threads) {
  constexpr int64_t kColumns = 1024;  // of a piece: its sums stay in the first-level cache
  const int64_t blocks = (x.rows + kSumRows - 1) / kSumRows;
  const int64_t pieces = (x.cols + kColumns - 1) / kColumns, tasks = blocks * pieces;
  const int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
  with_element(x.dtype, [&](auto element) {
    using E = decltype(element);
    const auto* data = static_cast<const typename E::type*>(x.data);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t block = task / pieces, col = task % pieces * kColumns;
      const int64_t count = std::min(kColumns, x.cols - col);
      float* sums = partial + block * x.cols + col;
      std::fill(sums, sums + count, 0.0f);
      for (int64_t row = block * kSumRows; row < std::min(x.rows, (block + 1) * kSumRows); ++row) {
        const auto* in = data + row * x.stride + col;
        int64_t j = 0;
        for (; j + kLanes <= count; j += kLanes) store(sums + j, load(sums + j) + E::load(in + j));
        for (; j < count; ++j) sums[j] += E::load_one(in + j);
      }
    }
  });
  std::fill(out, out + x.cols, 0.0f);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t j = 0; j < x.cols; ++j) out[j] += partial[block * x.cols + j];
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

// A bottleneck adapter in fp32 with a width that is a multiple of 16 and no dropout: LoRA's
// products and one pass over what is R wide.
//
// Floor, forward: x and the residual read, y written, 4 M (2 K + H) bytes or less; backward 4 M
// (2 K + 3 H). 12 M K R operations.
#include "bottleneck.h"

#include <memory>

#include "bias_activation.h"
#include "lora_linear.h"

namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

struct Room {  // not cleared
  explicit Room(int64_t size) : data(new float[size]) {}
  std::unique_ptr<float[]> data;
};

inline const float* floats(const Matrix& m) { return static_cast<const float*>(m.data); }

int team_of(int64_t rows, int64_t cols, int threads) {
  constexpr int64_t kWorthAThread = 1 << 13;  // elements
  return static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>(threads, rows * cols / kWorthAThread)));
}

}  // namespace

bool bottleneck_forward(const Bottleneck& adapter, const Matrix* residual, const Matrix* up_bias,
                        const Matrix* scale, const MutableMatrix& z, const MutableMatrix& y,
                        int threads) {
  const int64_t rank = z.cols;
  const Room down(adapter.x.cols * rank), up(rank * y.cols), h(z.rows * rank), outer(y.cols);
  transpose(adapter.down, down.data.get(), rank, threads);
  auto* inner = static_cast<float*>(z.data);
  lora_reduce(adapter.x, down.data.get(), rank, 1.0f, Dropout{}, inner, threads);
  const Vector bias(adapter.down_bias), added(up_bias), scales(scale);
  with_activation_or_none(adapter.activation, [&](auto act) {
#pragma omp parallel for schedule(static) num_threads(team_of(z.rows, rank, threads))
    for (int64_t row = 0; row < z.rows; ++row)
      for (int64_t r = 0; r < rank; r += kRegisterLanes) {
        float* own = inner + row * rank + r;
        vr value = read<vr>(own);
        if (bias.data()) value += read<vr>(bias.data() + r);
        std::memcpy(own, &value, sizeof value);
        const vr result = decltype(act)::value(value);
        std::memcpy(h.data.get() + row * rank + r, &result, sizeof result);
      }
  });
  transpose(adapter.up, up.data.get(), y.cols, threads);
  for (int64_t j = 0; j < y.cols; ++j) {
    const float own = adapter.factor * (scales.data() ? scales.data()[j] : 1.0f);
    if (added.data()) outer.data[j] = own * added.data()[j];
    if (own != 1.0f)
      for (int64_t r = 0; r < rank; ++r) up.data[r * y.cols + j] *= own;
  }
  const ExpandTerms terms{residual, nullptr, added.data() ? outer.data.get() : nullptr};
  lora_expand(h.data.get(), up.data.get(), rank, terms, Dropout{}, y, threads);
  return true;
}

bool bottleneck_backward(const Bottleneck& adapter, const Matrix& dy, const Matrix& z,
                         const Matrix* addend, float outer_factor,
                         const BottleneckGradients& gradients, int threads) {
  const int64_t rank = z.cols, rows = z.rows;
  const Room dz(rows * rank), h(rows * rank);
  lora_reduce(dy, floats(adapter.up), rank, adapter.factor, Dropout{}, dz.data.get(), threads);
  with_activation_or_none(adapter.activation, [&](auto act) {
#pragma omp parallel for schedule(static) num_threads(team_of(rows, rank, threads))
    for (int64_t i = 0; i < rows * rank; i += kRegisterLanes) {
      const Jet jet = decltype(act)::jet(read<vr>(floats(z) + i));
      const vr slope = read<vr>(dz.data.get() + i) * jet.slope;
      const vr value = outer_factor * jet.value;
      std::memcpy(dz.data.get() + i, &slope, sizeof slope);
      std::memcpy(h.data.get() + i, &value, sizeof value);
    }
  });
  if (gradients.dx) {
    const ExpandTerms terms{addend, nullptr, nullptr};
    lora_expand(dz.data.get(), floats(adapter.down), rank, terms, Dropout{}, *gradients.dx,
                threads);
  }
  if (gradients.down)
    lora_outer(adapter.x, dz.data.get(), rank, Dropout{}, *gradients.down, true, threads);
  if (gradients.up) lora_outer(dy, h.data.get(), rank, Dropout{}, *gradients.up, false, threads);
  const auto sum = [&](const Matrix& wide, float factor, const MutableMatrix& out) {
    const Room partial((rows + kSumRows - 1) / kSumRows * wide.cols), total(wide.cols);
    column_sum(wide, partial.data.get(), total.data.get(), threads);
    with_element(out.dtype, [&](auto element) {
      using E = decltype(element);
      for (int64_t i = 0; i < wide.cols; ++i)
        E::store_one(static_cast<typename E::type*>(out.data) + i, factor * total.data[i]);
    });
  };
  if (gradients.down_bias)
    sum({dz.data.get(), rows, rank, rank, DType::kFloat32}, 1.0f, *gradients.down_bias);
  if (gradients.up_bias) sum(dy, outer_factor, *gradients.up_bias);
  return true;
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

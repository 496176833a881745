// A whole bottleneck adapter; kernels.h states what each function computes.
#pragma once

#include <vector>

#include "activation.h"
#include "kernels.h"

namespace fasttune::cpu::FASTTUNE_ISA {

bool bottleneck_forward(const Bottleneck& adapter, const Matrix* residual, const Matrix* up_bias,
                        const Matrix* scale, const MutableMatrix& z, const MutableMatrix& y,
                        int threads);
bool bottleneck_backward(const Bottleneck& adapter, const Matrix& dy, const Matrix& z,
                         const Matrix* addend, float outer_factor,
                         const BottleneckGradients& gradients, int threads);

// A vector [1, n] of any dtype as fp32, or null.
class Vector {
 public:
  explicit Vector(const Matrix* given) : data_(given ? given->cols : 0) {
    if (given)
      with_element(given->dtype, [&](auto element) {
        using E = decltype(element);
        for (int64_t i = 0; i < given->cols; ++i)
          data_[i] = E::load_one(static_cast<const typename E::type*>(given->data) + i);
      });
  }
  const float* data() const { return data_.empty() ? nullptr : data_.data(); }

 private:
  std::vector<float> data_;
};

struct Identity {
  static vr value(vr x) { return x; }
  static Jet jet(vr x) { return {x, fill<vr>(1.0f)}; }
};

template <typename Body>
void with_activation_or_none(int activation, Body&& body) {
  if (activation < 0) return body(Identity{});
  with_activation(static_cast<Activation>(activation), body);
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

// Activations: the value, and the value with the slope d value / d x.
//
// No finite x gives a NaN: exponentials are of what cannot overflow or stand in a denominator, and
// products that could be 0 * inf are ordered or clamped so that they are not. NaN stays NaN.
#pragma once

#include "common/activation.h"
#include "math.h"

namespace fasttune::cpu::FASTTUNE_ISA {

struct Jet {
  vr value, slope;
};

struct Silu {
  static vr value(vr x) { return x * sigmoid(x); }
  static Jet jet(vr x) {
    const Sigmoids<vr> s(x);
    const vr a = x * s.plus;
    return {a, s.plus + a * s.minus};
  }
};

struct Gelu {
  // Phi(x), the normal distribution; `gaussian` is e^(-x^2 / 2).
  static vr distribution(vr x, vr gaussian) {
    const vr tail = scaled_normal_tail(magnitude(x)) * gaussian;
    return x < 0.0f ? tail : 1.0f - tail;
  }
  static vr value(vr x) { return x * distribution(x, exp(-0.5f * x * x)); }
  static Jet jet(vr x) {
    constexpr float kDensityAtZero = 0.398942280401432678f;  // 1 / sqrt(2 pi)
    const vr gaussian = exp(-0.5f * x * x), phi = distribution(x, gaussian);
    return {x * phi, phi + x * (kDensityAtZero * gaussian)};
  }
};

// (1 + tanh z) / 2 = sigmoid(2 z): one exponential, and the tail keeps its relative accuracy.
struct GeluTanh {
  static constexpr float kScale = 1.59576912160573071f;  // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.044715f;
  // Beyond 16 the sigmoid is 0 or 1; clamped, the cubic cannot overflow.
  static vr clamp(vr x) {
    const vr bound = fill<vr>(16.0f), below = x > bound ? bound : x;
    return below < -bound ? -bound : below;
  }
  static vr inner(vr x) { return x * (kScale + kScale * kCubic * x * x); }
  static vr value(vr x) { return x * sigmoid(inner(clamp(x))); }
  static Jet jet(vr x) {
    const vr bounded = clamp(x);
    const Sigmoids<vr> s(inner(bounded));
    const vr a = x * s.plus;
    const vr inner_slope = kScale + 3.0f * kScale * kCubic * bounded * bounded;
    return {a, s.plus + a * s.minus * inner_slope};
  }
};

struct QuickGelu {
  static constexpr float kScale = 1.702f;
  static vr value(vr x) { return x * sigmoid(kScale * x); }
  static Jet jet(vr x) {
    const Sigmoids<vr> s(kScale * x);
    const vr a = x * s.plus;
    return {a, s.plus + kScale * (a * s.minus)};
  }
};

struct Relu {
  static vr value(vr x) { return x <= 0.0f ? vr{} : x; }
  static Jet jet(vr x) { return {value(x), x <= 0.0f ? vr{} : fill<vr>(1.0f)}; }
};

struct Relu2 {
  static vr value(vr x) {
    const vr r = Relu::value(x);
    return r * r;
  }
  static Jet jet(vr x) {
    const vr r = Relu::value(x);
    return {r * r, r + r};
  }
};

struct Tanh {
  static vr value(vr x) { return tanh(x); }
  static Jet jet(vr x) {
    const vr t = tanh(x);
    return {t, 1.0f - t * t};
  }
};

struct Sigmoid {
  static vr value(vr x) { return sigmoid(x); }
  static Jet jet(vr x) {
    const Sigmoids<vr> s(x);
    return {s.plus, s.plus * s.minus};
  }
};

struct LeakyRelu {
  static constexpr float kSlope = 0.01f;
  static vr value(vr x) { return x <= 0.0f ? kSlope * x : x; }
  static Jet jet(vr x) { return {value(x), x <= 0.0f ? fill<vr>(kSlope) : fill<vr>(1.0f)}; }
};

// Calls body(Silu{}) and so on for the run-time code.
template <typename Body>
inline void with_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::kSilu:
      return body(Silu{});
    case Activation::kGelu:
      return body(Gelu{});
    case Activation::kGeluTanh:
      return body(GeluTanh{});
    case Activation::kQuickGelu:
      return body(QuickGelu{});
    case Activation::kRelu:
      return body(Relu{});
    case Activation::kRelu2:
      return body(Relu2{});
    case Activation::kTanh:
      return body(Tanh{});
    case Activation::kSigmoid:
      return body(Sigmoid{});
    case Activation::kLeakyRelu:
      return body(LeakyRelu{});
  }
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

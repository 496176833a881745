// The activations of common/activation.h and their slopes; the formulas are in
// fasttune/ops/glu.py. No finite x gives a NaN, and a NaN stays one.
#pragma once

#include "common/activation.h"
#include "cuda/primitives.cuh"

namespace fasttune::cuda {

struct Jet {
  float value, slope;
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

struct Silu {
  static __device__ __forceinline__ Jet jet(float x) {
    const float s = sigmoid(x), value = x * s;
    return {value, s + value * sigmoid(-x)};
  }
};

struct Gelu {
  static __device__ __forceinline__ Jet jet(float x) {
    constexpr float kRootHalf = 0.707106781186547524f;
    constexpr float kDensityAtZero = 0.398942280401432678f;  // 1 / sqrt(2 pi)
    const float distribution = 0.5f * erfcf(-x * kRootHalf);
    return {x * distribution, distribution + x * (kDensityAtZero * expf(-0.5f * x * x))};
  }
};

struct GeluTanh {
  static __device__ __forceinline__ Jet jet(float x) {
    constexpr float kScale = 1.59576912160573071f;  // 2 sqrt(2 / pi)
    constexpr float kCubic = 0.044715f;
    // Beyond 16 the sigmoid is 0 or 1; clamped, the cubic cannot overflow. Compared rather than
    // fminf: that would turn a NaN into the bound.
    const float bounded = x > 16.0f ? 16.0f : x < -16.0f ? -16.0f : x;
    const float z = bounded * (kScale + kScale * kCubic * bounded * bounded);
    const float s = sigmoid(z), value = x * s;
    return {value, s + value * sigmoid(-z) * (kScale + 3.0f * kScale * kCubic * bounded * bounded)};
  }
};

struct QuickGelu {
  static __device__ __forceinline__ Jet jet(float x) {
    constexpr float kScale = 1.702f;
    const float s = sigmoid(kScale * x), value = x * s;
    return {value, s + kScale * value * sigmoid(-kScale * x)};
  }
};

struct Relu {
  static __device__ __forceinline__ Jet jet(float x) {
    return x <= 0.0f ? Jet{0.0f, 0.0f} : Jet{x, 1.0f};
  }
};

struct Relu2 {
  static __device__ __forceinline__ Jet jet(float x) {
    const float r = x <= 0.0f ? 0.0f : x;
    return {r * r, r + r};
  }
};

struct Tanh {
  static __device__ __forceinline__ Jet jet(float x) {
    const float t = tanhf(x);
    return {t, 1.0f - t * t};
  }
};

struct Sigmoid {
  static __device__ __forceinline__ Jet jet(float x) {
    const float s = sigmoid(x);
    return {s, s * sigmoid(-x)};
  }
};

struct LeakyRelu {
  static constexpr float kSlope = 0.01f;
  static __device__ Jet jet(float x) {
    return {x <= 0.0f ? kSlope * x : x, x <= 0.0f ? kSlope : 1.0f};
  }
};

// body(A{}) with the activation of a code.
template <typename F>
void with_activation(Activation activation, F&& body) {
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

}  // namespace fasttune::cuda

// exp, tanh, sigmoid and the tail of the normal distribution, on vectors of any width. exp and tanh
// after Cephes (expf, tanhf), exp with AVX-512 by its own instructions; their relative error is
// below 2 ulp.
#pragma once

#include "register.h"

namespace fasttune::cpu::FASTTUNE_ISA {

// The vector of int32 beside a vector of float.
template <typename F>
using IntegersOf = decltype(F{} < F{});

template <typename F>
inline F fill(float value) {
  return value - F{};
}

template <typename F>
inline F magnitude(F x) {
  return (F)((IntegersOf<F>)x & 0x7fffffff);
}

template <typename F>
inline F exp(F x) {
  const F highest = fill<F>(88.72f), lowest = fill<F>(-87.3f);
  F clamped = x > highest ? highest : x;
  clamped = clamped < lowest ? lowest : clamped;
  // n = round(x log2 e), by adding and subtracting 1.5 * 2^23.
  const F n = (clamped * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  F r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  F p = fill<F>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const auto exponent = __builtin_convertvector(n, IntegersOf<F>);
  F y = (F)((IntegersOf<F>)p + (exponent << 23));
  y = x > highest ? fill<F>(std::numeric_limits<float>::infinity()) : y;
  y = x < lowest ? F{} : y;
  return x == x ? y : x;  // NaN stays NaN
}

// exp(x) of scores minus their maximum: x <= 0, up to a rounding error. 0 below -87.3, NaN stays
// NaN.
inline vr exp_nonpositive(vr x) {
#if defined(__AVX512F__)  // about half the instructions of the above; right for all x below 89
  const vf log2e = splat(1.44269504088896341f), log2e_rest = splat(1.92596299e-8f);
  const vf n = (vf)_mm512_roundscale_ps((__m512)(x * log2e), _MM_FROUND_TO_NEAREST_INT);
  // The compiler would subtract from the product above, which is rounded.
  const vf rest = (vf)_mm512_fmsub_ps((__m512)x, (__m512)log2e, (__m512)n);
  const vf r = x * log2e_rest + rest;
  vf p = splat(1.535336159e-4f);  // 2^r on [-0.5, 0.5] to 2e-9, with 1 exact: minimax
  p = p * r + splat(1.339887452e-3f);
  p = p * r + splat(9.618437360e-3f);
  p = p * r + splat(5.550332471e-2f);
  p = p * r + splat(2.402264791e-1f);
  p = p * r + splat(6.931472029e-1f);
  p = p * r + splat(1.0f);
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-87.3f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  return exp(x);
#endif
}

#if defined(__AVX512F__)
inline vf exp(vf x) {  // min gives its second operand where one is NaN
  return exp_nonpositive((vf)_mm512_min_ps((__m512)splat(89.0f), (__m512)x));
}
#endif

// 1 / x of 1 <= x <= 2.
template <typename F>
inline F inverse(F x) {
  return 1.0f / x;
}
#if defined(__AVX512F__)
inline vf inverse(vf x) {  // a Newton step from 14 bits; a division takes three times as long
  const vf y = (vf)_mm512_rcp14_ps((__m512)x);
  return y + y * (1.0f - x * y);
}
#endif

template <typename F>
inline F tanh(F x) {
  const F size = magnitude(x), z = x * x;
  F p = fill<F>(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const F small = p * z * x + x;
  const F large = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  const F signed_large = (F)((IntegersOf<F>)large | ((IntegersOf<F>)x & (int32_t)0x80000000));
  return size < 0.625f ? small : signed_large;
}

// sigmoid(x) and sigmoid(-x) = 1 - sigmoid(x), both with a small relative error.
template <typename F>
struct Sigmoids {
  F plus, minus;

  explicit Sigmoids(F x) {
    const F e = exp_nonpositive(-magnitude(x)), larger = inverse(1.0f + e), smaller = e * larger;
    plus = x < 0.0f ? smaller : larger;
    minus = x < 0.0f ? larger : smaller;
  }
};

// 1 / (1 + e^-x); zero below -87.3, where the true value is below 1.3e-38.
template <typename F>
inline F sigmoid(F x) {
  return Sigmoids<F>(x).plus;
}

// Phi(-x) e^(x^2 / 2) for x >= 0, Phi the normal distribution: times e^(-x^2 / 2) the tail, with a
// small relative error however far out, where 1 - erf would cancel. 1 / (x + c) times a polynomial
// in s = (x - c) / (x + c), which keeps [0, inf) within [-1, 1] (after Shepherd and Laframboise,
// Math. Comp. 36, 1981), c = 3.75. Coefficients: least squares on 1200 Chebyshev nodes of s for
// x <= 13.5, reweighted to a minimax fit of the relative error (2^-26); evaluated in fp32 it stays
// below 5 * 2^-24. Beyond 13.2, e^(-x^2 / 2) is zero here.
template <typename F>
inline F scaled_normal_tail(F x) {
  const F t = 1.0f / (x + 3.75f);
  const F s = (x - 3.75f) * t;
  F p = fill<F>(4.43412020e-4f);
  p = p * s + 5.09540958e-4f;
  p = p * s - 4.16906783e-3f;
  p = p * s + 1.20009168e-3f;
  p = p * s + 3.74925248e-2f;
  p = p * s - 1.51520833e-1f;
  p = p * s + 3.52939606e-1f;
  p = p * s - 5.88188291e-1f;
  p = p * s + 7.50294089e-1f;
  return p * t;
}

#if !defined(__AVX512F__)
inline vf exp(vf x) {
  return by_registers(x, [](vr part) { return exp(part); });
}
inline vf tanh(vf x) {
  return by_registers(x, [](vr part) { return tanh(part); });
}
#endif

}  // namespace fasttune::cpu::FASTTUNE_ISA

// exp and tanh on sixteen lanes. Polynomials after Cephes (expf, tanhf); relative error below 2
// ulp.
#pragma once

#include "simd.h"

namespace fasttune::cpu::FASTTUNE_ISA {

inline vf exp(vf x) {
  const vf log2e = splat(1.44269504088896341f);
  const vf clamped =
      select(x > splat(88.72f), splat(88.72f), select(x < splat(-87.3f), splat(-87.3f), x));
  // n = round(x log2 e), by adding and subtracting 1.5 * 2^23.
  const vf shifter = splat(12582912.0f);
  const vf shifted = clamped * log2e + shifter;
  const vf n = shifted - shifter;
  vf r = clamped - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  const vi exponent = __builtin_convertvector(n, vi);
  vf y = (vf)((vi)p + (exponent << 23));
  y = select(x > splat(88.72f), splat(std::numeric_limits<float>::infinity()), y);
  y = select(x < splat(-87.3f), splat(0.0f), y);
  return select(x == x, y, x);  // NaN stays NaN
}

inline vf tanh(vf x) {
  const vf magnitude = (vf)((vi)x & 0x7fffffff);
  const vf z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + splat(2.06390887954e-2f);
  p = p * z + splat(-5.37397155531e-2f);
  p = p * z + splat(1.33314422036e-1f);
  p = p * z + splat(-3.33332819422e-1f);
  const vf small = p * z * x + x;
  const vf large = splat(1.0f) - splat(2.0f) / (exp(magnitude + magnitude) + splat(1.0f));
  const vf signed_large = (vf)((vi)large | ((vi)x & (int32_t)0x80000000));
  return select(magnitude < splat(0.625f), small, signed_large);
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

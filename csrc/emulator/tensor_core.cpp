// How a tensor core adds. Neither documented by the vendor nor IEEE 754: this is what A100 was
// found to do with products of 16-bit numbers (Fasi et al., 2021, PeerJ Computer Science 7:e330;
// Khattak and Mikaitis, 2025, arXiv:2512.07004). H100 adds sixteen products at once and keeps one
// bit more.
#include <cmath>
#include <cstring>

#include "cuda.h"

namespace emulator {
namespace {

constexpr int kProducts = 8;
constexpr int kExtraBits = 1;  // of an addend, below the last one of fp32

// 0 for a subnormal, 2047 for infinity and NaN.
int biased_exponent(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<int>(bits >> 52 & 0x7ff);
}

// Of an exponent of fp32 or of a product of 16-bit numbers.
double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float cut_to_float(double value) {
  const float rounded = static_cast<float>(value);
  const bool away = std::fabs(static_cast<double>(rounded)) > std::fabs(value);
  return away ? std::nextafter(rounded, 0.0f) : rounded;
}

}  // namespace

// c + all products: each addend is cut at the same bit, counted from the largest one, the sum is
// exact, and the result cut to fp32.
float tensor_core_sum(float c, const double (&products)[kProducts]) {
  int largest = biased_exponent(c);
  for (const double product : products) {
    const int own = biased_exponent(product);
    if (own > largest) largest = own;
  }
  double sum = c;
  if (largest == 0 || largest == 2047) {  // zeros, or whatever infinities and NaN add up to
    for (const double product : products) sum += product;
    return static_cast<float>(sum);
  }
  const int unit = largest - 1023 - 23 - kExtraBits;
  const double inverse = power_of_two(-unit);
  auto whole = static_cast<int64_t>(sum * inverse);  // a cast cuts
  for (const double product : products) whole += static_cast<int64_t>(product * inverse);
  return cut_to_float(static_cast<double>(whole) * power_of_two(unit));
}

}  // namespace emulator

// CUDA's vector types and its 16-bit floating-point types, for the host.
#pragma once

#include <cstdint>
#include <cstring>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

// Trivial, so that they can lie in shared memory and in unions, as CUDA's own.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof result);
  return result;
}

// To nearest, ties to even; a NaN becomes quiet.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  if (value != value) return {0x7FFF};
  return {static_cast<uint16_t>((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16)};
}

inline float __half2float(__half value) {
  _Float16 narrow;
  std::memcpy(&narrow, &value, sizeof narrow);
  return static_cast<float>(narrow);
}

inline __half __float2half_rn(float value) {
  const _Float16 narrow = static_cast<_Float16>(value);
  __half result;
  std::memcpy(&result, &narrow, sizeof result);
  return result;
}

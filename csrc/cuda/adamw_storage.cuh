// How AdamW stores 16-bit parameters and small moments; fasttune/ops/_adamw_storage.py states the
// formats. A thread has kRun neighbouring elements, those of one counter of random bits, and a warp
// the kQuantised elements of one scale.
#pragma once

#include "common/adamw.h"
#include "common/philox.h"
#include "cuda/elements.cuh"

namespace fasttune::cuda {

constexpr int kRun = 8;
static_assert(kRun * 32 == kQuantised);

struct RandomBits {
  uint64_t seed;
  uint32_t stream, step;
  uint32_t counter;  // of this thread's run

  __device__ __forceinline__ void draw(uint32_t purpose, uint32_t (&lanes)[kRun]) const {
    const PhiloxWords words = philox(seed, counter, stream, step, purpose);
    for (int i = 0; i < kRun; ++i) lanes[i] = words.word[i / 2] >> (i % 2 * 16) & 0xffffu;
  }
};

__device__ __forceinline__ __nv_bfloat16 rounded_stochastically(float value, uint32_t random) {
  const uint32_t bits = bits_of(value);
  return is_finite(bits) ? bf16_of((bits + random) >> 16) : rounded_to<__nv_bfloat16>(value);
}

__device__ __forceinline__ float load_master(__nv_bfloat16 weight, int16_t low) {
  return float_of((upper_of(weight) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low)));
}
__device__ __forceinline__ void store_master(float master, __nv_bfloat16* weight, int16_t* low) {
  const uint32_t bits = bits_of(master), nearest = (bits + 0x8000u) >> 16;
  const bool finite = is_finite(bits);
  *weight = finite ? bf16_of(nearest) : rounded_to<__nv_bfloat16>(master);
  *low = static_cast<int16_t>(finite ? bits - (nearest << 16) : 0u);
}

template <bool Signed>
__device__ __forceinline__ float load_code(uint8_t code, float scale) {
  constexpr uint32_t lowest = kLowestCode<Signed>;
  const uint32_t size = code & (Signed ? 0x7fu : 0xffu);
  const float value = float_of(size ? (size + lowest) << kCodeShift : 0u) * scale;
  return Signed && code >= 0x80 ? -value : value;
}

// Returns the scale of the warp's elements; all lanes must call.
template <bool Signed>
__device__ __forceinline__ float store_codes(const float (&values)[kRun],
                                             const uint32_t (&random)[kRun],
                                             uint8_t (&codes)[kRun]) {
  constexpr int lowest = static_cast<int>(kLowestCode<Signed>);
  float largest = 0.0f;
  int broken = 0;
  for (int i = 0; i < kRun; ++i) {
    const float size = fabsf(values[i]);
    broken |= !is_finite(bits_of(size));
    largest = size > largest ? size : largest;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(0xFFFFFFFFu, largest, offset);
    broken |= __shfl_xor_sync(0xFFFFFFFFu, broken, offset);
    largest = other > largest ? other : largest;
  }
  const float smallest_normal = float_of(0x00800000u);
  const bool empty = largest < smallest_normal;
  const float inverse = 1.0f / (empty ? 1.0f : largest);
  for (int i = 0; i < kRun; ++i) {
    const float size = fabsf(values[i]), scaled = fminf(size * inverse, 1.0f);
    const int rounded = static_cast<int>((bits_of(scaled) + (random[i] << 4)) >> kCodeShift);
    const int least = !Signed && size > 0.0f ? 1 : 0, code = rounded - lowest;
    const int magnitude = code > least ? code : least;
    codes[i] = static_cast<uint8_t>(magnitude | (Signed && values[i] < 0.0f ? 0x80 : 0));
    if (empty) codes[i] = 0;
    if (broken) codes[i] = 1;
  }
  if (broken) return float_of(0x7fc00000u);
  return empty ? 0.0f : largest;
}

}  // namespace fasttune::cuda

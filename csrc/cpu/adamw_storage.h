// How AdamW stores parameters of 16 bits and small moments: to fp32 and back, up to kQuantised
// elements at a time. docs/optimizer.md states the formats.
#pragma once

#include <cmath>

#include "staging.h"

namespace fasttune::cpu::FASTTUNE_ISA {

// Who draws random bits: the counter of element k is (k / 8, stream, step, purpose).
struct RandomBits {
  uint64_t seed;
  uint32_t stream, step;
};

// 16 random bits for each of the kQuantised elements from `first`, a multiple of 8.
inline void draw(const RandomBits& random, uint32_t purpose, int64_t first, uint32_t* bits) {
  for (int64_t i = 0; i < kQuantised / 8; ++i) {
    const uint32_t counter = static_cast<uint32_t>(first / 8 + i);
    const PhiloxWords words = philox(random.seed, counter, random.stream, random.step, purpose);
    for (int lane = 0; lane < 8; ++lane)
      bits[8 * i + lane] = words.word[lane / 2] >> (lane % 2 * 16) & 0xffffu;
  }
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline bool is_finite(uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }

// bf16 towards either neighbour, with probabilities that keep the mean.
inline void store_stochastic(const float* src, const uint32_t* random, int64_t count,
                             uint16_t* dst) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(src[i]);
    const uint32_t exact = src[i] == src[i] ? bits >> 16 : 0x7fc0u;
    dst[i] = static_cast<uint16_t>(is_finite(bits) ? (bits + random[i]) >> 16 : exact);
  }
}

// An fp32 master as its nearest bf16 (ties away from zero, so that what is left fits 16 bits) and
// the difference of the patterns.
inline void load_master(const uint16_t* weight, const int16_t* low, int64_t count, float* dst) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t high = static_cast<uint32_t>(weight[i]) << 16;
    dst[i] = float_of(high + static_cast<uint32_t>(static_cast<int32_t>(low[i])));
  }
}
inline void store_master(const float* src, int64_t count, uint16_t* weight, int16_t* low) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(src[i]), nearest = (bits + 0x8000u) >> 16;
    const bool finite = is_finite(bits);
    const uint32_t special = src[i] == src[i] ? bits >> 16 : 0x7fc0u;
    weight[i] = static_cast<uint16_t>(finite ? nearest : special);
    low[i] = static_cast<int16_t>(finite ? bits - (nearest << 16) : 0u);
  }
}

// 8-bit floats relative to the largest magnitude of the block.
template <bool kSigned>
struct Codes {
  static constexpr uint32_t kLowest = kLowestCode<kSigned>;
  static constexpr uint32_t kMagnitude = kSigned ? 0x7fu : 0xffu;

  static void load(const uint8_t* codes, float scale, int64_t count, float* dst) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t code = codes[i] & kMagnitude, sign = codes[i] & ~kMagnitude;
      const float size = float_of(code ? (code + kLowest) << kCodeShift : 0u) * scale;
      dst[i] = sign ? -size : size;
    }
  }

  // Returns the scale. A positive value never becomes 0 without a sign: as the square of a
  // gradient, it divides an update.
  static float store(const float* src, const uint32_t* random, int64_t count, uint8_t* codes) {
    float largest = 0;
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      const float size = std::fabs(src[i]);
      finite &= is_finite(bits_of(size));
      largest = size > largest ? size : largest;
    }
    if (!finite) {
      std::memset(codes, 1, count);
      return std::numeric_limits<float>::quiet_NaN();
    }
    if (largest < std::numeric_limits<float>::min()) {
      std::memset(codes, 0, count);
      return 0;
    }
    const float inverse = 1.0f / largest;
    for (int64_t i = 0; i < count; ++i) {
      const float size = std::fabs(src[i]), scaled = std::fmin(size * inverse, 1.0f);
      const int32_t rounded =
          static_cast<int32_t>((bits_of(scaled) + (random[i] << 4)) >> kCodeShift);
      const int32_t least = !kSigned && size > 0 ? 1 : 0;
      const int32_t code = std::max(rounded - static_cast<int32_t>(kLowest), least);
      codes[i] = static_cast<uint8_t>(code | (kSigned && src[i] < 0 ? 0x80 : 0));
    }
    return largest;
  }
};

}  // namespace fasttune::cpu::FASTTUNE_ISA

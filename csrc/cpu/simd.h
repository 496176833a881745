// Sixteen-lane vectors in GCC / Clang vector extensions: one zmm with AVX-512, two ymm with AVX2,
// four 128-bit registers otherwise. Only what the compiler cannot express well is an intrinsic.
// Included by the kernel files only, once per build; FASTTUNE_ISA names the build's namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "common/philox.h"
#include "kernels.h"

#define FASTTUNE_STRINGIFY_(name) #name
#define FASTTUNE_STRINGIFY(name) FASTTUNE_STRINGIFY_(name)

namespace fasttune::cpu::FASTTUNE_ISA {

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

// What one register holds, the same as vf with AVX-512. GCC keeps wider vectors in memory, so loops
// that live on registers are written in these.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr int kParts = 64 / kRegisterBytes;  // of a vf
constexpr int64_t kRegisterLanes = kLanes / kParts;
typedef float vr __attribute__((vector_size(kRegisterBytes)));
typedef int32_t vri __attribute__((vector_size(kRegisterBytes)));

inline vf splat(float value) { return value - (vf){}; }
inline vu splat(uint32_t value) { return value - (vu){}; }

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

inline vf as_float(vu v) { return (vf)v; }
inline vu as_bits(vf v) { return (vu)v; }

inline vf select(vi condition, vf yes, vf no) {
  return (vf)((condition & (vi)yes) | (~condition & (vi)no));
}
inline vr load_vr(const float* p) {
  vr v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vr splat_vr(float value) { return value - vr{}; }
#if !defined(__AVX512F__)
inline void store(float* p, vr v) { std::memcpy(p, &v, sizeof v); }
inline vr select(vri condition, vr yes, vr no) {
  return (vr)((condition & (vri)yes) | (~condition & (vri)no));
}
inline vr max(vr a, vr b) { return a > b ? a : b; }
#endif

inline vf max(vf a, vf b) {  // b if one is NaN
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return select(a > b, a, b);
#endif
}

inline float sum(vf v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}
inline float max(vf v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// The same by halves: four steps instead of fifteen, another order.
#if defined(__AVX512F__)
inline float fold_sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
inline float fold_max(vf v) { return _mm512_reduce_max_ps((__m512)v); }
#else
template <typename V, typename Combine>
inline float fold(V v, Combine&& combine) {
  constexpr int kCount = sizeof(V) / sizeof(float);
  float lanes[kCount];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = kCount / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  return lanes[0];
}
template <typename V>
inline float fold_sum(V v) {
  return fold(v, [](float a, float b) { return a + b; });
}
template <typename V>
inline float fold_max(V v) {
  return fold(v, [](float a, float b) { return a > b ? a : b; });
}
#endif

// fp16 <-> fp32, exact one way and rounded to nearest even the other.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  float value;
  uint32_t bits = magnitude;
  if (magnitude >= 0x7c00u << 13) {
    bits |= 0x7f800000u;  // infinity, NaN
    std::memcpy(&value, &bits, 4);
  } else {
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;  // rebias the exponent; exact for subnormals too
  }
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // subnormal: let the FPU round at the right bit
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | (bits >> 13));
}

template <DType>
struct Element;
template <>
struct Element<DType::kFloat32> {
  using type = float;
  static vf load(const float* p) { return FASTTUNE_ISA::load(p); }
  static void store(float* p, vf v) { FASTTUNE_ISA::store(p, v); }
  static float load_one(const float* p) { return *p; }
  static void store_one(float* p, float v) { *p = v; }
};
template <>
struct Element<DType::kBFloat16> {
  using type = uint16_t;
  static vf load(const uint16_t* p) {
    vh v;
    std::memcpy(&v, p, sizeof v);
#if defined(__AVX512F__)  // GCC splits the conversion into halves
    return as_float((vu)_mm512_cvtepu16_epi32((__m256i)v) << 16);
#else
    return as_float(__builtin_convertvector(v, vu) << 16);
#endif
  }
  static void store(uint16_t* p, vf v) {
    vu bits = as_bits(v);
    bits += 0x7fffu + ((bits >> 16) & 1u);
#if defined(__AVX512F__)
    bits = v == v ? bits : splat(0x7fc00000u);
    const vh half = (vh)_mm512_cvtepi32_epi16((__m512i)(bits >> 16));
#else
    bits = (vu)select(v == v, as_float(bits), as_float(splat(0x7fc00000u)));
    const vh half = __builtin_convertvector(bits >> 16, vh);
#endif
    std::memcpy(p, &half, sizeof half);
  }
  static float load_one(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  static void store_one(uint16_t* p, float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    *p = v == v ? static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : 0x7fc0u;
  }
};
template <>
struct Element<DType::kFloat16> {
  using type = uint16_t;
  static float load_one(const uint16_t* p) { return half_to_float(*p); }
  static void store_one(uint16_t* p, float v) { *p = float_to_half(v); }
#if defined(__AVX512F__)
  static vf load(const uint16_t* p) {
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(uint16_t* p, vf v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__F16C__)
  static vf load(const uint16_t* p) {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; i += 8)
      _mm256_storeu_ps(lanes + i,
                       _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
    return FASTTUNE_ISA::load(lanes);
  }
  static void store(uint16_t* p, vf v) {
    float lanes[kLanes];
    FASTTUNE_ISA::store(lanes, v);
    for (int i = 0; i < kLanes; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(lanes + i),
                                       _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  static vf load(const uint16_t* p) {
    vf v;
    for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i]);
    return v;
  }
  static void store(uint16_t* p, vf v) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
  }
#endif
};

// Calls body(Element<dtype>{}) for the run-time dtype.
template <typename Body>
inline void with_element(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Element<DType::kFloat32>{});
    case DType::kBFloat16:
      return body(Element<DType::kBFloat16>{});
    case DType::kFloat16:
      return body(Element<DType::kFloat16>{});
  }
}

// v where the lane's bit is set, else zero.
inline vf keep_lanes(vf v, uint32_t bits) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v);
#else
  constexpr vu lane_bit = {1,   2,   4,    8,    16,   32,   64,    128,
                           256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  const vi kept = (splat(bits) & lane_bit) != 0u;
  return (vf)(kept & (vi)v);
#endif
}

// Bit i of the result: is element (row, k + i) kept? k is a multiple of 64.
// One counter gives eight 16-bit lanes, so 64 elements take eight counters.
inline uint64_t keep_bits(const Dropout& dropout, uint64_t row, uint64_t k) {
  const uint32_t counter = static_cast<uint32_t>(k / 8);
  const uint32_t row_lo = static_cast<uint32_t>(row), row_hi = static_cast<uint32_t>(row >> 32);
#if defined(__AVX512F__)
  // 64-bit lane 2i holds counter i and lane 2i + 1 counter 4 + i, so that unpacking keeps order.
  __m512i c0 =
      _mm512_add_epi64(_mm512_set1_epi64(counter), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
  __m512i c1 = _mm512_set1_epi64(row_lo), c2 = _mm512_set1_epi64(row_hi);
  __m512i c3 = _mm512_set1_epi64(dropout.branch);
  const __m512i m0 = _mm512_set1_epi64(kPhiloxMultiplier0),
                m2 = _mm512_set1_epi64(kPhiloxMultiplier2);
  uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m512i p0 = _mm512_mul_epu32(c0, m0), p2 = _mm512_mul_epu32(c2, m2);
    // Only the low halves of the lanes matter to the next product; garbage above is harmless.
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p2, 32), c1, _mm512_set1_epi64(k0), 0x96);
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96);
    c1 = p2;
    c3 = p0;
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  const __mmask16 odd = 0xAAAA;
  const __m512i low = _mm512_mask_shuffle_epi32(c0, odd, c1, static_cast<_MM_PERM_ENUM>(0xA0));
  const __m512i high = _mm512_mask_shuffle_epi32(c2, odd, c3, static_cast<_MM_PERM_ENUM>(0xA0));
  const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(dropout.threshold));
  const uint64_t first = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(low, high), threshold);
  const uint64_t second = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(low, high), threshold);
  return first | second << 32;
#else
  // Eight counters side by side: the compiler turns the inner loops into vector code.
  uint32_t c0[8], c1[8], c2[8], c3[8];
  for (int i = 0; i < 8; ++i) {
    c0[i] = counter + i;
    c1[i] = row_lo;
    c2[i] = row_hi;
    c3[i] = dropout.branch;
  }
  uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int i = 0; i < 8; ++i) {
      const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0[i];
      const uint64_t p2 = static_cast<uint64_t>(kPhiloxMultiplier2) * c2[i];
      c0[i] = static_cast<uint32_t>(p2 >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(p2);
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
    for (int lane = 0; lane < 8; ++lane) {
      const uint32_t value = words[lane / 2] >> (lane % 2 * 16) & 0xffffu;
      bits |= static_cast<uint64_t>(value >= dropout.threshold) << (i * 8 + lane);
    }
  }
  return bits;
#endif
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

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

}  // namespace fasttune::cpu::FASTTUNE_ISA

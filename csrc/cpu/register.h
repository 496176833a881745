// Vectors of one register: 16 lanes with AVX-512, 8 with AVX2, 4 otherwise. The compiler splits
// sums and products of wider vectors into registers, but compares them lane by lane, so code that
// compares (math.h) is written for any width and runs on these.
#pragma once

#include "simd.h"

namespace fasttune::cpu::FASTTUNE_ISA {

typedef uint32_t ru __attribute__((vector_size(kRegisterBytes)));
typedef uint16_t rh __attribute__((vector_size(kRegisterBytes / 2)));

template <typename V>
inline V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Loads and stores of one register by Element type.
template <typename E>
struct Register;

template <>
struct Register<Element<DType::kFloat32>> {
  static vr load(const float* p) { return read<vr>(p); }
  static void store(float* p, vr v) { std::memcpy(p, &v, sizeof v); }
};

#if defined(__AVX512F__)
template <DType dtype>
struct Register<Element<dtype>> : Element<dtype> {};
#else
template <>
struct Register<Element<DType::kBFloat16>> {
  static vr load(const uint16_t* p) { return (vr)(__builtin_convertvector(read<rh>(p), ru) << 16); }
  static void store(uint16_t* p, vr v) {
    ru bits = (ru)v;
    bits += 0x7fffu + ((bits >> 16) & 1u);
    bits = v == v ? bits : bits - bits + 0x7fc00000u;
    const rh half = __builtin_convertvector(bits >> 16, rh);
    std::memcpy(p, &half, sizeof half);
  }
};

template <>
struct Register<Element<DType::kFloat16>> {
#if defined(__F16C__)
  static vr load(const uint16_t* p) {
    return (vr)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(uint16_t* p, vr v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  static vr load(const uint16_t* p) {
    vr v;
    for (int i = 0; i < kRegisterLanes; ++i) v[i] = half_to_float(p[i]);
    return v;
  }
  static void store(uint16_t* p, vr v) {
    for (int i = 0; i < kRegisterLanes; ++i) p[i] = float_to_half(v[i]);
  }
#endif
};
#endif

// f(v) for a function of one register.
template <typename F>
inline vf by_registers(vf v, F f) {
  vr parts[kLanes / kRegisterLanes];
  std::memcpy(parts, &v, sizeof v);
  for (vr& part : parts) part = f(part);
  std::memcpy(&v, parts, sizeof v);
  return v;
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

// Runs of elements of any dtype to fp32 and back, for kernels that compute on fp32 copies.
#pragma once

#include "simd.h"

namespace fasttune::cpu::FASTTUNE_ISA {

inline void widen(const void* src, DType dtype, int64_t count, float* dst) {
  with_element(dtype, [&](auto element) {
    using E = decltype(element);
    const auto* data = static_cast<const typename E::type*>(src);
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) store(dst + j, E::load(data + j));
    for (; j < count; ++j) dst[j] = E::load_one(data + j);
  });
}

inline void narrow(const float* src, int64_t count, DType dtype, void* dst) {
  with_element(dtype, [&](auto element) {
    using E = decltype(element);
    auto* data = static_cast<typename E::type*>(dst);
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) E::store(data + j, load(src + j));
    for (; j < count; ++j) E::store_one(data + j, src[j]);
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

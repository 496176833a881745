// Element types of kernels, their 16-byte packs, and the choice of a type by its code.
#pragma once

#include "common/dtype.h"
#include "cuda/primitives.cuh"

namespace fasttune::cuda {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

// Rounds to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T rounded_to(float value);
template <>
__device__ __forceinline__ float rounded_to<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 rounded_to<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half rounded_to<__half>(float value) {
  return __float2half_rn(value);
}

// The bits of fp32 and bf16, whose patterns are the upper halves of fp32's.
__device__ __forceinline__ uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
__device__ __forceinline__ float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
__device__ __forceinline__ bool is_finite(uint32_t bits) {
  return (bits & 0x7f800000u) != 0x7f800000u;
}
__device__ __forceinline__ __nv_bfloat16 bf16_of(uint32_t upper) {
  const uint16_t bits = static_cast<uint16_t>(upper);
  __nv_bfloat16 value;
  memcpy(&value, &bits, 2);
  return value;
}
__device__ __forceinline__ uint32_t upper_of(__nv_bfloat16 value) {
  uint16_t bits;
  memcpy(&bits, &value, 2);
  return bits;
}

constexpr int kVectorBytes = 16;  // the widest access of a thread to memory

template <typename T, int N>
struct alignas(sizeof(T) * N < kVectorBytes ? sizeof(T) * N : kVectorBytes) Pack {
  T values[N];
};

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* address) {
  return *reinterpret_cast<const Pack<T, N>*>(address);
}

template <int N, typename T>
__device__ __forceinline__ void store_pack(T* address, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(address) = pack;
}

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
}

// Whether every row starts at a multiple of 16 bytes; a null pointer is no obstacle.
inline bool rows_aligned(const void* data, int64_t stride, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
         (data == nullptr || stride * element_bytes % kVectorBytes == 0);
}

// Blocks for so many items; further ones are taken in turns.
inline dim3 grid_for(int64_t items, int threads) {
  constexpr int64_t kMaxBlocks = 65535;
  const int64_t blocks = (items + threads - 1) / threads;
  return dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
}

template <typename F>
void with_element(DType dtype, F&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(__nv_bfloat16{});
    case DType::kFloat16:
      return body(__half{});
  }
}

// body(T{}) or body(float{}): a tensor that has its partner's type or fp32.
template <typename T, typename F>
void with_element_or_float(bool is_float, F&& body) {
  if (is_float)
    body(float{});
  else
    body(T{});
}

}  // namespace fasttune::cuda

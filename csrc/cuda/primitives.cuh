// What kernels need beyond portable CUDA C++, for nvcc and for the emulator. The only file that
// asks which of the two compiles it, and the only home of inline PTX.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/stream.h"

#if defined(FASTTUNE_EMULATE)
#include "emulator/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#if defined(FASTTUNE_EMULATE)
#define FASTTUNE_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::emulator::dynamic_shared())
#else
#define FASTTUNE_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char fasttune_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(fasttune_dynamic_shared)
#endif

namespace fasttune::cuda {

#if defined(FASTTUNE_EMULATE)
inline std::string device_error() { return ""; }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
            Arguments... arguments) {
  const auto body = [=] { kernel(arguments...); };
  using Body = decltype(body);
  ::emulator::launch(
      grid, block, shared_bytes, [](const void* self) { (*static_cast<Body*>(self))(); }, &body,
      sizeof body);
}
#else
inline std::string in_words(cudaError_t error) {
  if (error == cudaSuccess) return "";
  int driver = 0;
  const bool none = cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0;
  return std::string(none ? "no CUDA driver: " : "") + cudaGetErrorString(error);
}

inline std::string device_error() {
  int count = 0;
  return in_words(cudaGetDeviceCount(&count));
}

// Throws std::runtime_error if the launch fails.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream stream, Arguments... arguments) {
  // As C++, which clang-format takes this for, it would part the brackets.
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  // clang-format on
  const std::string error = in_words(cudaGetLastError());
  if (!error.empty()) throw std::runtime_error("a CUDA kernel was not launched: " + error);
}
#endif

// sm_75 has neither cp.async nor these products of 16-bit types: a kernel with them is compiled for
// it, so that every target has the same kernels, and traps.
#if !defined(FASTTUNE_EMULATE) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define FASTTUNE_BEFORE_SM80
#endif

// Starts a copy of 16 bytes from global to shared memory, past the registers.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
#if defined(FASTTUNE_EMULATE)
  ::emulator::copy_async(shared, global, 16);
#elif defined(FASTTUNE_BEFORE_SM80)
  __trap();
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#endif
}

__device__ __forceinline__ void copy_async_commit() {
#if defined(FASTTUNE_EMULATE)
  ::emulator::copy_async_commit();
#elif defined(FASTTUNE_BEFORE_SM80)
  __trap();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most GroupsLeft committed groups of this thread are under way. Other threads see
// the data after a barrier.
template <int GroupsLeft>
__device__ __forceinline__ void copy_async_wait() {
#if defined(FASTTUNE_EMULATE)
  ::emulator::copy_async_wait(GroupsLeft);
#elif defined(FASTTUNE_BEFORE_SM80)
  __trap();
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8,
// and gets elements 2 (lane % 4) and the next of row lane / 4 of each matrix.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&out)[4], const void* row) {
#if defined(FASTTUNE_EMULATE)
  const auto rows = ::emulator::exchange(~0u, &row, sizeof row, EMULATOR_SITE);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const void* from;
    uint32_t whole[4];
    __builtin_memcpy(&from, rows.bytes[matrix * 8 + ::emulator::here.lane / 4], sizeof from);
    ::emulator::read_shared(from, whole, sizeof whole);
    out[matrix] = whole[::emulator::here.lane % 4];
  }
#else
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
#endif
}

// The same of the transposed matrices: a lane gets elements lane / 4 of rows 2 (lane % 4) and the
// next.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&out)[4], const void* row) {
#if defined(FASTTUNE_EMULATE)
  const auto rows = ::emulator::exchange(~0u, &row, sizeof row, EMULATOR_SITE);
  for (int matrix = 0; matrix < 4; ++matrix) {
    out[matrix] = 0;
    for (int i = 0; i < 2; ++i) {
      const void* from;
      uint16_t whole[8];
      __builtin_memcpy(&from, rows.bytes[matrix * 8 + ::emulator::here.lane % 4 * 2 + i],
                       sizeof from);
      ::emulator::read_shared(from, whole, sizeof whole);
      out[matrix] |= static_cast<uint32_t>(whole[::emulator::here.lane / 4]) << 16 * i;
    }
  }
#else
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
#endif
}

#if defined(FASTTUNE_EMULATE)
inline float value_of_bits(__nv_bfloat16, uint16_t bits) {
  return __bfloat162float(__nv_bfloat16{bits});
}
inline float value_of_bits(__half, uint16_t bits) { return __half2float(__half{bits}); }

// The fragments of the PTX manual: with group = lane / 4 and pair = lane % 4, a lane holds of A
// rows group and group + 8 at columns 2 pair + {0, 1} and + 8, of B those rows at column group, and
// of C rows group and group + 8 at columns 2 pair + {0, 1}.
template <typename T>
void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto all = ::emulator::exchange(~0u, own, sizeof own, EMULATOR_SITE);
  const auto element = [&](unsigned lane, unsigned word, unsigned half) {
    uint16_t bits;
    __builtin_memcpy(&bits, all.bytes[lane] + word * 4 + half * 2, sizeof bits);
    return value_of_bits(T{}, bits);
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = ::emulator::here.lane / 4, upper = i / 2;
    const unsigned col = ::emulator::here.lane % 4 * 2 + i % 2;
    for (unsigned beyond = 0; beyond < 2; ++beyond) {
      double products[8];
      for (unsigned k = 0; k < 8; ++k)
        products[k] = static_cast<double>(element(row * 4 + k / 2, upper + 2 * beyond, k % 2)) *
                      element(col * 4 + k / 2, 4 + beyond, k % 2);
      c[i] = ::emulator::tensor_core_sum(c[i], products);
    }
  }
}
#endif

// C [16, 8] fp32 += A [16, 16] B [16, 8], in the tensor cores; one warp. They cut the sum instead
// of rounding it: a long chain of products drifts towards zero, by up to an ulp of C each.
__device__ __forceinline__ void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2], __nv_bfloat16) {
#if defined(FASTTUNE_EMULATE)
  multiply_fragments<__nv_bfloat16>(c, a, b);
#elif defined(FASTTUNE_BEFORE_SM80)
  __trap();
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2], __half) {
#if defined(FASTTUNE_EMULATE)
  multiply_fragments<__half>(c, a, b);
#elif defined(FASTTUNE_BEFORE_SM80)
  __trap();
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The same with the sum rounded: what is cut is of the one product alone. For long sums.
template <typename T>
__device__ __forceinline__ void add_product_16x8x16(float (&c)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2], T) {
  float own[4] = {};
  multiply_16x8x16(own, a, b, T{});
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += own[i];
}

}  // namespace fasttune::cuda

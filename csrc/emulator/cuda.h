// The part of CUDA C++ that kernels use, on the host: docs/cuda_on_the_host.md.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// All thread-local storage of the library is shared memory: the runtime finds it as one segment,
// in templates too, and one block at a time runs on an operating-system thread.
#define __shared__ static thread_local

namespace emulator {

struct Here {
  uint3 thread, block;
  dim3 block_size, grid_size;
  unsigned lane;
};
extern Here here;

constexpr size_t kMaxExchange = 32;  // bytes a lane gives to a warp operation

struct Exchanged {
  unsigned char bytes[32][kMaxExchange];
};

void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*),
            const void* arguments, size_t argument_bytes);
void* dynamic_shared();
void sync_block(const char* site);
void sync_warp(unsigned mask, const char* site);
// Waits for the lanes of `mask`; gives what each of them brought.
Exchanged exchange(unsigned mask, const void* bytes, size_t count, const char* site);
void check_lane(unsigned mask, unsigned source, const char* site);
void note_atomic(void* address, size_t bytes);
float tensor_core_sum(float c, const double (&products)[8]);
void read_shared(const void* from, void* to, size_t bytes);
void copy_async(void* shared, const void* global, size_t bytes);
void copy_async_commit();
void copy_async_wait(unsigned groups_left);

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const char* site) {
  static_assert(sizeof(T) <= kMaxExchange);
  check_lane(mask, source, site);
  const Exchanged all = exchange(mask, &value, sizeof value, site);
  T result;
  __builtin_memcpy(&result, all.bytes[source], sizeof result);
  return result;
}

inline unsigned vote(unsigned mask, bool predicate, const char* site) {
  const Exchanged all = exchange(mask, &predicate, 1, site);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) ballot |= static_cast<unsigned>(all.bytes[lane][0] & 1) << lane;
  return ballot;
}

inline unsigned down(unsigned delta) {
  return here.lane + delta < 32 ? here.lane + delta : here.lane;
}
inline unsigned up(unsigned delta) { return here.lane >= delta ? here.lane - delta : here.lane; }

}  // namespace emulator

#define threadIdx (::emulator::here.thread)
#define blockIdx (::emulator::here.block)
#define blockDim (::emulator::here.block_size)
#define gridDim (::emulator::here.grid_size)

#define EMULATOR_TEXT_(x) #x
#define EMULATOR_TEXT(x) EMULATOR_TEXT_(x)
#define EMULATOR_SITE __FILE__ ":" EMULATOR_TEXT(__LINE__)

#define __syncthreads() ::emulator::sync_block(EMULATOR_SITE)
#define __syncwarp(mask) ::emulator::sync_warp(mask, EMULATOR_SITE)
#define __shfl_sync(mask, value, source) \
  ::emulator::shuffle(mask, value, (source) & 31, EMULATOR_SITE)
#define __shfl_xor_sync(mask, value, bits) \
  ::emulator::shuffle(mask, value, ::emulator::here.lane ^ (bits), EMULATOR_SITE)
#define __shfl_down_sync(mask, value, delta) \
  ::emulator::shuffle(mask, value, ::emulator::down(delta), EMULATOR_SITE)
#define __shfl_up_sync(mask, value, delta) \
  ::emulator::shuffle(mask, value, ::emulator::up(delta), EMULATOR_SITE)
#define __ballot_sync(mask, predicate) ::emulator::vote(mask, predicate, EMULATOR_SITE)
#define __any_sync(mask, predicate) (::emulator::vote(mask, predicate, EMULATOR_SITE) != 0)
#define __all_sync(mask, predicate) (::emulator::vote(mask, predicate, EMULATOR_SITE) == (mask))

// Blocks run one after another: what one wrote, later ones see.
#define __threadfence() ((void)0)

// Not preempted between the load and the store: threads change at synchronisation only.
template <typename T>
__attribute__((noinline, no_sanitize("thread"))) T atomicAdd(T* address, T value) {
  emulator::note_atomic(address, sizeof(T));
  const T old = *address;
  *address = old + value;
  return old;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }

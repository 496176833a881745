// What the kernels of AdamW share: runs of elements of a thread, and sums over thread blocks.
#pragma once

#include "cuda/adamw.cuh"
#include "cuda/adamw_storage.cuh"
#include "cuda/reduce.cuh"

namespace fasttune::cuda {

constexpr int kAdamWThreads = 256;
constexpr int64_t kAdamWStride = kAdamWThreads * kRun;  // at a time; a warp has one scale's

// kRun elements from `first` on; zeros (or `rest`) beyond numel.
template <typename T>
__device__ __forceinline__ void load_run(const T* data, int64_t first, int64_t numel, bool whole,
                                         T rest, T (&out)[kRun]) {
  if (whole) {
    const Pack<T, kRun> pack = load_pack<kRun>(data + first);
    for (int i = 0; i < kRun; ++i) out[i] = pack.values[i];
  } else {
    for (int i = 0; i < kRun; ++i) out[i] = first + i < numel ? data[first + i] : rest;
  }
}

template <typename T>
__device__ __forceinline__ void store_run(T* data, int64_t first, int64_t numel, bool whole,
                                          const T (&in)[kRun]) {
  if (whole) {
    Pack<T, kRun> pack;
    for (int i = 0; i < kRun; ++i) pack.values[i] = in[i];
    store_pack(data + first, pack);
  } else {
    for (int i = 0; i < kRun; ++i)
      if (first + i < numel) data[first + i] = in[i];
  }
}

// Whether this thread block is the last of `count` to come here; the counter is 0 again then, and
// what the others stored before is visible.
__device__ __forceinline__ bool is_last_block(int* counter, int count) {
  __shared__ int last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == count - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  __threadfence();
  return last != 0;
}

// Sum of every `stride`-th of partial[0 .. count * stride) in fp64, by thread 0 of the block, in
// fixed order: the threads' own sums one after the other.
__device__ __forceinline__ double ordered_sum(const float* partial, int64_t count, int64_t stride) {
  __shared__ double sums[kAdamWThreads];
  double own = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kAdamWThreads) own += partial[i * stride];
  __syncthreads();  // the readers of an earlier sum are done
  sums[threadIdx.x] = own;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0)
    for (int i = 0; i < kAdamWThreads; ++i) total += sums[i];
  return total;
}

}  // namespace fasttune::cuda

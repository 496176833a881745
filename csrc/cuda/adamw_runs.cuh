// What the kernels of AdamW share: runs of elements of a thread, parameters, and sums over thread
// blocks.
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

// A parameter of one thread in fp32.
template <typename P, Rounding Kind>
struct Parameter {
  P* data;
  void* residue;

  __device__ __forceinline__ void load(int64_t first, int64_t numel, bool whole,
                                       float (&out)[kRun]) const {
    P run[kRun];
    load_run(data, first, numel, whole, rounded_to<P>(0.0f), run);
    if constexpr (Kind == Rounding::kMaster) {
      int16_t low[kRun];
      load_run(static_cast<const int16_t*>(residue), first, numel, whole, int16_t{0}, low);
      for (int i = 0; i < kRun; ++i) out[i] = load_master(run[i], low[i]);
    } else {
      for (int i = 0; i < kRun; ++i) out[i] = to_float(run[i]);
    }
    if constexpr (Kind == Rounding::kKahan) {
      P rest[kRun];
      load_run(static_cast<const P*>(residue), first, numel, whole, rounded_to<P>(0.0f), rest);
      for (int i = 0; i < kRun; ++i) out[i] += to_float(rest[i]);
    }
  }

  __device__ __forceinline__ void store(const RandomBits& random, int64_t first, int64_t numel,
                                        bool whole, const float (&in)[kRun]) const {
    P run[kRun];
    if constexpr (Kind == Rounding::kMaster) {
      int16_t low[kRun];
      for (int i = 0; i < kRun; ++i) store_master(in[i], &run[i], &low[i]);
      store_run(static_cast<int16_t*>(residue), first, numel, whole, low);
    } else if constexpr (Kind == Rounding::kStochastic) {
      uint32_t bits[kRun];
      random.draw(kWeightBits, bits);
      for (int i = 0; i < kRun; ++i) run[i] = rounded_stochastically(in[i], bits[i]);
    } else {
      for (int i = 0; i < kRun; ++i) run[i] = rounded_to<P>(in[i]);
      if constexpr (Kind == Rounding::kKahan) {
        P rest[kRun];
        for (int i = 0; i < kRun; ++i) rest[i] = rounded_to<P>(in[i] - to_float(run[i]));
        store_run(static_cast<P*>(residue), first, numel, whole, rest);
      }
    }
    store_run(data, first, numel, whole, run);
  }
};

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

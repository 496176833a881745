// Sums over a block, in an order that depends on its size alone.
#pragma once

#include "cuda/primitives.cuh"

namespace fasttune::cuda {

// The sum of `value` over the Threads of the block, in every thread; all of them must call.
template <int Threads>
__device__ __forceinline__ float block_sum(float value) {
  static_assert(Threads % 32 == 0);
  __shared__ float partial[Threads / 32];
  for (int offset = 16; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  __syncthreads();  // the readers of an earlier sum are done
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < Threads / 32; ++warp) sum += partial[warp];
  return sum;
}

}  // namespace fasttune::cuda

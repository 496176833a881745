// What lanes do with the fragments of a product: the keep bits of dropout, and four neighbouring
// sums.
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/elements.cuh"

namespace fasttune::cuda {

// The keep bits of a lane's two columns in four runs of eight: rows row + group and row + group + 8
// of an octet, then of the next. Each lane of four draws one run's bits for all.
__device__ __forceinline__ void keep_pairs(uint32_t (&two)[4], uint64_t seed, uint32_t threshold,
                                           uint32_t stream, uint64_t row, uint32_t octet) {
  const int lane = threadIdx.x % 32, pair = lane % 4;
  const uint32_t kept =
      keep_bits(seed, threshold, stream, row + lane / 4 + pair % 2 * 8, octet + pair / 2);
  for (int i = 0; i < 4; ++i)
    two[i] = __shfl_sync(0xFFFFFFFFu, kept, lane / 4 * 4 + i) >> (2 * pair) & 3u;
}

// All bits of the elements of a register that two keep bits keep.
__device__ __forceinline__ uint32_t register_mask(uint32_t two) {
  return (two & 1 ? 0x0000ffffu : 0u) | (two & 2 ? 0xffff0000u : 0u);
}

// Two sums of a lane and two of its neighbour as four neighbouring ones: of row group in even
// lanes, of row group + 8 in odd ones.
__device__ __forceinline__ Pack<float, 4> joined(const float (&c)[4]) {
  const bool odd = threadIdx.x % 2;
  const float first = __shfl_xor_sync(0xFFFFFFFFu, odd ? c[0] : c[2], 1);
  const float second = __shfl_xor_sync(0xFFFFFFFFu, odd ? c[1] : c[3], 1);
  return odd ? Pack<float, 4>{{first, second, c[2], c[3]}}
             : Pack<float, 4>{{c[0], c[1], first, second}};
}

// Stores up to four neighbours from column `first` of a row on; 16 bytes at once if `whole` is
// true.
__device__ __forceinline__ void store_four(float* row, int64_t first, int64_t cols, bool whole,
                                           const Pack<float, 4>& four) {
  if (whole) {
    if (first < cols) store_pack(row + first, four);
  } else {
    for (int i = 0; i < 4; ++i)
      if (first + i < cols) row[first + i] = four.values[i];
  }
}

}  // namespace fasttune::cuda

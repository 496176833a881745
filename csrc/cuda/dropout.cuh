// Which elements dropout keeps; common/philox.h has the format.
#pragma once

#include "common/philox.h"
#include "cuda/primitives.cuh"

namespace fasttune::cuda {

// Of one counter: bit i says whether element 8 octet + i of the row is kept.
__device__ __forceinline__ uint32_t keep_bits(uint64_t seed, uint32_t threshold, uint32_t stream,
                                              uint64_t row, uint32_t octet) {
  const PhiloxWords words =
      philox(seed, octet, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), stream);
  uint32_t kept = 0;
  for (int i = 0; i < 8; ++i) {
    const uint32_t bits = words.word[i / 2] >> (i % 2 * 16) & 0xffffu;
    kept |= static_cast<uint32_t>(bits >= threshold) << i;
  }
  return kept;
}

}  // namespace fasttune::cuda

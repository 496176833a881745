// Philox4x32 with seven rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011) and the dropout format that every backend shares; docs/design.md states it.
#pragma once

#include <cstdint>

namespace fasttune {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier2 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxKeyStep1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 7;

// Which elements of the input of one LoRA branch are kept. threshold 0 keeps all.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // keep if lane >= threshold, in 1 / 65536
  uint32_t branch;
  uint64_t row_offset;
  // On the CPU, the bits as a kernel drew them before, a word for 64 columns; null: draw them.
  const uint64_t* drawn;
  int64_t drawn_stride;
};

#if defined(__CUDACC__)
#define FASTTUNE_HOST_DEVICE __host__ __device__
#else
#define FASTTUNE_HOST_DEVICE
#endif

struct PhiloxWords {
  uint32_t word[4];
};

FASTTUNE_HOST_DEVICE inline PhiloxWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2,
                                               uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t p2 = static_cast<uint64_t>(kPhiloxMultiplier2) * c2;
    c0 = static_cast<uint32_t>(p2 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p2);
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fasttune

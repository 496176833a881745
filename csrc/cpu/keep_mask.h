// Which elements dropout keeps, in the fixed format of docs/design.md, 64 at a time.
#pragma once

#include "common/philox.h"
#include "simd.h"

namespace fasttune::cpu::FASTTUNE_ISA {

// v where the lane's bit is set, else zero.
inline vf keep_lanes(vf v, uint32_t bits) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v);
#else
  if ((bits & 0xffffu) == 0xffffu) return v;  // without dropout
  constexpr vu lane_bit = {1,   2,   4,    8,    16,   32,   64,    128,
                           256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  const vi kept = (splat(bits) & lane_bit) != 0u;
  return (vf)(kept & (vi)v);
#endif
}

// The keep bits of one branch. The keys of the rounds depend on the seed alone: made once a call,
// they are operands in memory instead of a broadcast from a general register in every round.
class KeepMask {
 public:
  explicit KeepMask(const Dropout& dropout) : dropout_(dropout) {
    uint32_t k0 = static_cast<uint32_t>(dropout.seed);
    uint32_t k1 = static_cast<uint32_t>(dropout.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      keys_[round][0] = k0;
      keys_[round][1] = k1;
      k0 += kPhiloxKeyStep0;
      k1 += kPhiloxKeyStep1;
    }
  }

  bool keeps_all() const { return dropout_.threshold == 0; }

  // Bit i of the result: is element (row, col + i) kept? col is a multiple of kMaskSpan, and row
  // counts from row_offset. One counter gives eight 16-bit lanes, so 64 elements take eight.
  uint64_t span(int64_t row, int64_t col) const {
    if (keeps_all()) return ~uint64_t{0};
    if (dropout_.drawn) return dropout_.drawn[row * dropout_.drawn_stride + col / kMaskSpan];
    return draw(dropout_.row_offset + static_cast<uint64_t>(row), static_cast<uint32_t>(col / 8));
  }

 private:
#if defined(__AVX512F__)
  uint64_t draw(uint64_t row, uint32_t counter) const {
    // 64-bit lane 2i holds counter i and lane 2i + 1 counter 4 + i, so that unpacking keeps order.
    __m512i c0 =
        _mm512_add_epi64(_mm512_set1_epi64(counter), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
    __m512i c1 = _mm512_set1_epi64(static_cast<uint32_t>(row));
    __m512i c2 = _mm512_set1_epi64(static_cast<uint32_t>(row >> 32));
    __m512i c3 = _mm512_set1_epi64(dropout_.branch);
    const __m512i m0 = _mm512_set1_epi64(kPhiloxMultiplier0),
                  m2 = _mm512_set1_epi64(kPhiloxMultiplier2);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m512i p0 = _mm512_mul_epu32(c0, m0), p2 = _mm512_mul_epu32(c2, m2);
      const __m512i k0 = _mm512_set1_epi64(keys_[round][0]),
                    k1 = _mm512_set1_epi64(keys_[round][1]);
      // Only the low halves of the lanes matter to the next product; garbage above is harmless.
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p2, 32), c1, k0, 0x96);
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, k1, 0x96);
      c1 = p2;
      c3 = p0;
    }
    const __mmask16 odd = 0xAAAA;
    const __m512i low = _mm512_mask_shuffle_epi32(c0, odd, c1, static_cast<_MM_PERM_ENUM>(0xA0));
    const __m512i high = _mm512_mask_shuffle_epi32(c2, odd, c3, static_cast<_MM_PERM_ENUM>(0xA0));
    const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(dropout_.threshold));
    const uint64_t first = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(low, high), threshold);
    const uint64_t second = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(low, high), threshold);
    return first | second << 32;
  }
#else
  // Eight counters side by side: the compiler turns the inner loops into vector code.
  uint64_t draw(uint64_t row, uint32_t counter) const {
    uint32_t c0[8], c1[8], c2[8], c3[8];
    for (int i = 0; i < 8; ++i) {
      c0[i] = counter + i;
      c1[i] = static_cast<uint32_t>(row);
      c2[i] = static_cast<uint32_t>(row >> 32);
      c3[i] = dropout_.branch;
    }
    for (const auto& key : keys_) {
      for (int i = 0; i < 8; ++i) {
        const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0[i];
        const uint64_t p2 = static_cast<uint64_t>(kPhiloxMultiplier2) * c2[i];
        c0[i] = static_cast<uint32_t>(p2 >> 32) ^ c1[i] ^ static_cast<uint32_t>(key[0]);
        c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ static_cast<uint32_t>(key[1]);
        c1[i] = static_cast<uint32_t>(p2);
        c3[i] = static_cast<uint32_t>(p0);
      }
    }
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) {
      const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
      for (int lane = 0; lane < 8; ++lane) {
        const uint32_t value = words[lane / 2] >> (lane % 2 * 16) & 0xffffu;
        bits |= static_cast<uint64_t>(value >= dropout_.threshold) << (i * 8 + lane);
      }
    }
    return bits;
  }
#endif

  Dropout dropout_;
  uint64_t keys_[kPhiloxRounds][2];  // as wide as the lanes that read them
};

}  // namespace fasttune::cpu::FASTTUNE_ISA

// The tile registers of AMX: eight of 16 rows of 64 bytes, and the product of two of them. In bf16
//
//   C[m, n] += sum over k < 32 of A[m, k] B[k, n], in fp32
//
// with A stored by rows, [16, 32], and B by pairs of k: [16 pairs, 16 columns, 2] (an "interleaved"
// tile below). Products are exact, sums are fp32; values below 2^-126 count as zero. Defined by the
// Intel 64 and IA-32 Architectures Software Developer's Manual, TDPBF16PS. With
// FASTTUNE_EMULATE_AMX the same in plain C++, so that every CPU can test what is built on it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "simd.h"

namespace fasttune::cpu::FASTTUNE_ISA {

constexpr int64_t kTileSide = 16;           // rows of a tile, columns of a tile of fp32
constexpr int64_t kTileDepth = 32;          // values of k in one product
constexpr int64_t kTileElements = 16 * 32;  // bf16 values in a tile
constexpr int64_t kTileRowBytes = 64;

#if defined(FASTTUNE_EMULATE_AMX)

struct Tile {
  alignas(64) unsigned char rows[kTileSide][kTileRowBytes];
};
inline thread_local Tile tiles[8];

struct UseTiles {};

template <int T>
inline void tile_zero() {
  std::memset(&tiles[T], 0, sizeof(Tile));
}
template <int T>
inline void tile_load(const void* data, int64_t stride_bytes) {
  for (int64_t i = 0; i < kTileSide; ++i)
    std::memcpy(tiles[T].rows[i], static_cast<const char*>(data) + i * stride_bytes, kTileRowBytes);
}
template <int T>
inline void tile_store(void* data, int64_t stride_bytes) {
  for (int64_t i = 0; i < kTileSide; ++i)
    std::memcpy(static_cast<char*>(data) + i * stride_bytes, tiles[T].rows[i], kTileRowBytes);
}
template <int C, int A, int B>
inline void tile_dot() {
  const auto flushed = [](vf v) {  // subnormal numbers count as zero
    return (vf)select((as_bits(v) & 0x7f800000u) != 0u, v, as_float(as_bits(v) & 0x80000000u));
  };
  const auto half = [&](uint32_t bits) {
    float value;
    bits = (bits & 0x7f800000u) ? bits : bits & 0x80000000u;
    std::memcpy(&value, &bits, 4);
    return splat(value);
  };
  for (int64_t m = 0; m < kTileSide; ++m) {
    vf even = {}, odd = {};
    for (int64_t k = 0; k < kTileSide; ++k) {
      uint32_t a;
      vu b;
      std::memcpy(&a, tiles[A].rows[m] + 4 * k, 4);
      std::memcpy(&b, tiles[B].rows[k], sizeof b);
      even += half(a << 16) * flushed(as_float(b << 16));
      odd += half(a & 0xffff0000u) * flushed(as_float(b & 0xffff0000u));
    }
    vf c;
    std::memcpy(&c, tiles[C].rows[m], sizeof c);
    c += even + odd;
    std::memcpy(tiles[C].rows[m], &c, sizeof c);
  }
}

#else

// Tile registers in use by the calling thread, all of full size, for the life of this object.
struct UseTiles {
  UseTiles() {
    alignas(64) unsigned char config[64] = {1};  // palette 1
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = kTileRowBytes;
      config[48 + tile] = kTileSide;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~UseTiles() { __asm__ volatile("tilerelease"); }
  UseTiles(const UseTiles&) = delete;
  UseTiles& operator=(const UseTiles&) = delete;
};

// Written as assembly because the compilers' intrinsics take the register as a literal, not as a
// template parameter.
template <int T>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* data, int64_t stride_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(data), "r"(stride_bytes), "i"(T)
                   : "memory");
}
template <int T>
inline void tile_store(void* data, int64_t stride_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(data), "r"(stride_bytes), "i"(T)
                   : "memory");
}
template <int C, int A, int B>
inline void tile_dot() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// bf16 values for one call, aligned to 64 bytes: a buffer that the thread keeps or, where that
// would be large, one of the call's own.
class TileScratch {
 public:
  explicit TileScratch(int64_t elements) {
    constexpr int64_t kKeptBytes = 4 << 20;
    thread_local Buffer kept;
    thread_local int64_t kept_bytes = 0;
    const int64_t bytes = std::max<int64_t>(2 * elements, kTileRowBytes);
    if (bytes > kKeptBytes) {
      own_ = allocate(bytes);
      data_ = own_.get();
      return;
    }
    if (kept_bytes < bytes) {
      kept = allocate(bytes);
      kept_bytes = bytes;
    }
    data_ = kept.get();
  }
  uint16_t* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(uint16_t* data) const { ::operator delete(data, kAlignment); }
  };
  using Buffer = std::unique_ptr<uint16_t, Free>;
  static Buffer allocate(int64_t bytes) {
    return Buffer(static_cast<uint16_t*>(::operator new(bytes, kAlignment)));
  }

  Buffer own_;
  uint16_t* data_;
};

// An fp32 value as the sum of three bf16 ones, each in the upper half of its lane: exact, because
// 24 bits are three times eight and each part is cut off instead of rounded. What is not finite
// stays in the first part. Parts below 2^-126 get lost: a value below 2^-102 has fewer bits.
struct Terms {
  vu part[3];
};
inline Terms split(vf v) {
  constexpr uint32_t kUpper = 0xffff0000u, kExponent = 0x7f800000u;
  const vu bits = as_bits(v);
  const vi finite = (bits & kExponent) != kExponent;
  Terms terms;
  terms.part[0] = bits & kUpper;
  vf rest = select(finite, v - as_float(terms.part[0]), vf{});
  terms.part[0] |= (vu)(v != v) & 0x00400000u;  // a NaN stays one without its lower bits
  terms.part[1] = as_bits(rest) & kUpper;
  rest -= as_float(terms.part[1]);
  terms.part[2] = as_bits(rest) & kUpper;
  return terms;
}

// The first `count` of 32 lanes of bf16, of 16 of fp32.
inline __mmask32 lower_lanes(int64_t count) {
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1;
}
inline __mmask16 lower_floats(int64_t count) { return static_cast<__mmask16>(lower_lanes(count)); }

// 32 values in bf16, rounded to nearest even; what is below 2^-126 becomes zero.
inline __m512i rounded(vf low, vf high) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// Two lanes of upper halves as pairs (first, second) of bf16.
inline vu pair(vu first, vu second) { return (first >> 16) | second; }

// Sixteen lanes each of the pairs (first, second) of 32 bf16 values.
struct Interleaved {
  __m512i lower, upper;
};
inline Interleaved interleave_lanes(__m512i first, __m512i second) {
  alignas(64) static const uint16_t kLower[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                  11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i lower = _mm512_load_si512(kLower);
  const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  return {_mm512_permutex2var_epi16(first, lower, second),
          _mm512_permutex2var_epi16(first, upper, second)};
}

inline void store_pairs(uint16_t* p, vu pairs) { std::memcpy(p, &pairs, sizeof pairs); }

}  // namespace fasttune::cpu::FASTTUNE_ISA

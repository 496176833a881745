// Register-blocked matrix products of fp32 blocks: every flop of attention is done here.
//
// Floor: an FMA per 16 multiply-adds. A tile of kTileRows x kTileVectors sums loads one vector a
// column and broadcasts one value a row for each step of the depth, so with AVX-512 10 loads feed
// 16 FMAs, and the FMA units stay busy from the first-level cache.
#pragma once

#include "attention_plan.h"
#include "simd.h"

namespace fasttune::cpu::FASTTUNE_ISA {

// Sums that a build holds in registers beside the operands.
#if defined(__AVX512F__)
constexpr int64_t kTileRows = 8;
constexpr int kTileVectors = 2;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int64_t kTileRows = 4;
constexpr int kTileVectors = 1;
#else
constexpr int64_t kTileRows = 2;
constexpr int kTileVectors = 1;
#endif
constexpr int64_t kStrips = kBlockRows / kTileRows;  // of a block
static_assert(kBlockRows % kTileRows == 0 && kBlockKeys % (kTileVectors * kLanes) == 0);

// A left operand: rows of fp32 as stored, [M, K]; or transposed, stored as [K, M]; or rows of pairs
// of bf16, [M, K / 2], whose products a bf16 dot product takes exactly and sums in fp32. The right
// operand is [K, N] fp32, or [K / 2, N] pairs.
struct Rows {
  const float* data;
  int64_t stride;
  Rows from(int64_t row) const { return {data + row * stride, stride}; }
  float at(int64_t row, int64_t k) const { return data[row * stride + k]; }
  static vr multiply_add(float row, vr column, vr sum) { return sum + splat_vr(row) * column; }
};

struct Columns {
  const float* data;
  int64_t stride;
  float at(int64_t row, int64_t k) const { return data[k * stride + row]; }
  static vr multiply_add(float row, vr column, vr sum) { return sum + splat_vr(row) * column; }
};

#if defined(__AVX512BF16__)
struct PairRows {
  const float* data;  // bits of two bf16 each
  int64_t stride;
  PairRows from(int64_t row) const { return {data + row * stride, stride}; }
  float at(int64_t row, int64_t k) const { return data[row * stride + k]; }
  static vr multiply_add(float row, vr column, vr sum) {
    return (vr)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(row), (__m512bh)column);
  }
};
#endif

// finish(i, j, sum over k < depth of a[i, k] * b[k, j : j + kRegisterLanes]) for all j of a tile.
template <int Vectors, typename Left, typename Finish>
__attribute__((noinline)) void tile(Left a, const float* b, int64_t b_stride, int64_t depth,
                                    Finish&& finish) {
  constexpr int kRegisters = Vectors * kParts;
  vr sums[kTileRows][kRegisters] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vr column[kRegisters];
#pragma GCC unroll 4
    for (int v = 0; v < kRegisters; ++v) column[v] = load_vr(b + k * b_stride + v * kRegisterLanes);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTileRows; ++i) {
      const float row = a.at(i, k);
#pragma GCC unroll 4
      for (int v = 0; v < kRegisters; ++v)
        sums[i][v] = Left::multiply_add(row, column[v], sums[i][v]);
    }
  }
#if defined(__AVX512F__)
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kRegisters; ++v) finish(i, v * kRegisterLanes, sums[i][v]);
  }
#else  // Few registers: what finish needs would push sums out of them for the whole loop.
  float block[kTileRows][Vectors * kLanes];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kRegisters; ++v) store(block[i] + v * kRegisterLanes, sums[i][v]);
  }
  for (int64_t i = 0; i < kTileRows; ++i)
    for (int64_t j = 0; j < Vectors * kLanes; j += kRegisterLanes)
      finish(i, j, load_vr(block[i] + j));
#endif
}

// Calls body(std::integral_constant<int, V>, column) over `columns`, padded to kLanes.
template <typename Body>
inline __attribute__((always_inline)) void over_columns(int64_t columns, Body&& body) {
  constexpr int64_t kWide = kTileVectors * kLanes;
  int64_t column = 0;
  for (; column + kWide - kLanes < columns; column += kWide)
    body(std::integral_constant<int, kTileVectors>{}, column);
  if (column < columns) body(std::integral_constant<int, 1>{}, column);
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

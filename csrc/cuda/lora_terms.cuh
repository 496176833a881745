// Products of fp32 with a 16-bit type on tensor cores, no operand rounded: fp32 is three bf16 terms
// of eight bits each, fp16 is two, and products of bf16 are exact. fasttune_kernels' dot_exact is
// the same.
#pragma once

#include "cuda/lora_tiles.cuh"

namespace fasttune::cuda {

// A number cut to its leading 8 significant bits, which a bf16 holds.
__device__ __forceinline__ float leading(float value) {
  return float_of(bits_of(value) & 0xffff0000u);
}

__device__ __forceinline__ uint32_t packed(float first, float second) {
  return bits_of(first) >> 16 | (bits_of(second) & 0xffff0000u);
}

// Two numbers as pairs of bf16 that add up to them, the largest terms first.
template <int Terms>
__device__ __forceinline__ void split(float first, float second, uint32_t (&terms)[Terms]) {
  for (int i = 0; i < Terms; ++i) {
    terms[i] = packed(first, second);
    first -= leading(first);
    second -= leading(second);
  }
}

// How many bf16 terms a product of T and fp32 has, and those of a fragment of T.
__device__ __forceinline__ void split_rhs(const uint32_t (&b)[2], uint32_t (&terms)[1][2],
                                          __nv_bfloat16) {
  for (int i = 0; i < 2; ++i) terms[0][i] = b[i];
}
__device__ __forceinline__ void split_rhs(const uint32_t (&b)[2], uint32_t (&terms)[2][2], __half) {
  for (int i = 0; i < 2; ++i) {
    __half pair[2];
    memcpy(pair, &b[i], sizeof pair);
    uint32_t own[2];
    split(to_float(pair[0]), to_float(pair[1]), own);
    for (int term = 0; term < 2; ++term) terms[term][i] = own[term];
  }
}
template <typename T>
constexpr int kRhsTerms = 1;
template <>
constexpr int kRhsTerms<__half> = 2;

// Sum += lhs rhs, the smallest products first; lhs in terms, rhs a fragment of T.
template <typename T>
__device__ __forceinline__ void multiply_terms(float (&sum)[4], const uint32_t (&lhs)[3][4],
                                               const uint32_t (&rhs)[2], T) {
  uint32_t terms[kRhsTerms<T>][2];
  split_rhs(rhs, terms, T{});
#pragma unroll
  for (int right = kRhsTerms<T> - 1; right >= 0; --right)
#pragma unroll
    for (int left = 2; left >= 0; --left)
      multiply_16x8x16(sum, lhs[left], terms[right], __nv_bfloat16{});
}

// The same with the sum rounded, as in add_product_16x8x16: for long sums.
template <typename T>
__device__ __forceinline__ void add_terms(float (&sum)[4], const uint32_t (&lhs)[3][4],
                                          const uint32_t (&rhs)[2], T) {
  float own[4] = {};
  multiply_terms(own, lhs, rhs, T{});
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += own[i];
}

// Rows [row, row + 16) and columns [col, col + 16) of a tile of fp32 as a product's A, in terms.
template <int Columns>
__device__ __forceinline__ void load_lhs_terms(uint32_t (&terms)[3][4], const float* tile, int row,
                                               int col) {
  using Tile = SharedTile<float, Columns>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = col + i / 2 * 8 + lane % 4 * 2;
    const float* from = tile + Tile::offset(row + lane / 4 + i % 2 * 8, at / 4);
    const Pack<float, 2> two = load_pack<2>(from + at % 4);
    uint32_t own[3];
    split(two.values[0], two.values[1], own);
    for (int term = 0; term < 3; ++term) terms[term][i] = own[term];
  }
}

// The same of the tile's transpose: its columns [row, row + 16) and rows [col, col + 16).
template <int Columns>
__device__ __forceinline__ void load_lhs_terms_transposed(uint32_t (&terms)[3][4],
                                                          const float* tile, int row, int col) {
  using Tile = SharedTile<float, Columns>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = row + lane / 4 + i % 2 * 8, first = col + i / 2 * 8 + lane % 4 * 2;
    uint32_t own[3];
    split(tile[Tile::offset(first, at / 4) + at % 4],
          tile[Tile::offset(first + 1, at / 4) + at % 4], own);
    for (int term = 0; term < 3; ++term) terms[term][i] = own[term];
  }
}

}  // namespace fasttune::cuda

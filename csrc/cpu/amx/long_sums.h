// The long sums of LoRA's products on tiles: bf16 values times fp32 ones, which go in as three bf16
// terms each.
#pragma once

#include "amx/lora_blocks.h"

namespace fasttune::cpu::FASTTUNE_ISA {

constexpr int64_t kSumSteps = 8;  // products that one accumulator takes: 256 values of k. One sum
                                  // over all would be several times less exact
constexpr int64_t kSumDepth = kSumSteps * kTileDepth;

inline const uint16_t* row_of(const Matrix& x, int64_t row) {
  return static_cast<const uint16_t*>(x.data) + row * x.stride;
}

// Which of the span's columns exist and are kept.
inline uint64_t kept(const Matrix& x, const KeepMask& mask, int64_t row, int64_t col) {
  const int64_t valid = x.cols - col;
  if (row >= x.rows || valid <= 0) return 0;
  const uint64_t inside = valid >= kMaskSpan ? ~uint64_t{0} : (uint64_t{1} << valid) - 1;
  return mask.span(row, col) & inside;
}

inline __m512i load_kept(const uint16_t* p, uint64_t bits) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(bits), p);
}

// [rows of a block, kSumDepth] of x, with dropout and zeros beyond the matrix.
inline void stage_rows(const Matrix& x, const KeepMask& mask, int64_t row, int64_t col,
                       uint16_t* block) {
  const int64_t width = std::min(kSumDepth, (x.cols - col + kMaskSpan - 1) / kMaskSpan * kMaskSpan);
  for (int64_t i = 0; i < kRowsOfBlock; ++i)
    for (int64_t span = 0; span < width; span += kMaskSpan) {
      const uint64_t bits = kept(x, mask, row + i, col + span);
      uint16_t* to = block + i * kSumDepth + span;
      const uint16_t* from = bits ? row_of(x, row + i) + col + span : to;
      _mm512_store_si512(to, load_kept(from, bits));
      _mm512_store_si512(to + kTileDepth, load_kept(from + kTileDepth, bits >> 32));
    }
}

// Asks for a span of two rows that are staged some pairs later: their distance hides them from the
// CPU's own prefetching.
inline void prefetch_pair(const Matrix& x, int64_t row, int64_t col) {
  constexpr int64_t kAhead = 24;
  if (row + kAhead + 1 >= x.rows) return;
  const char* first = reinterpret_cast<const char*>(row_of(x, row + kAhead) + col);
  const char* second = first + 2 * x.stride;
  _mm_prefetch(first, _MM_HINT_T0);
  _mm_prefetch(first + kTileRowBytes, _MM_HINT_T0);
  _mm_prefetch(second, _MM_HINT_T0);
  _mm_prefetch(second + kTileRowBytes, _MM_HINT_T0);
}

// Interleaved tiles [step, 4, 16 pairs of rows, 16 columns, 2] of a span of x, kSumDepth rows; or
// each half of the span's columns for itself, [2, kSumSteps, 2, ...].
template <bool Halves = false>
inline void stage_columns(const Matrix& x, const KeepMask& mask, int64_t row, int64_t steps,
                          int64_t col, uint16_t* block) {
  constexpr int64_t kStep = (Halves ? 2 : 4) * kTileElements;
  constexpr int64_t kHalf = Halves ? kSumSteps * kStep : 2 * kTileElements;
  for (int64_t p = 0; p < steps * kTileSide; ++p) {
    const int64_t m = row + 2 * p;
    const uint64_t first = kept(x, mask, m, col), second = kept(x, mask, m + 1, col);
    prefetch_pair(x, m, col);
    uint16_t* to = block + p / kTileSide * kStep + p % kTileSide * kTileDepth;
    const uint16_t* a = first ? row_of(x, m) + col : to;
    const uint16_t* b = second ? row_of(x, m + 1) + col : to;
    for (int half = 0; half < 2; ++half) {
      const __m512i va = load_kept(a + half * kTileDepth, first >> (32 * half));
      const __m512i vb = load_kept(b + half * kTileDepth, second >> (32 * half));
      uint16_t* target = to + half * kHalf;
      const Interleaved both = interleave_lanes(va, vb);
      _mm512_store_si512(target, both.lower);
      _mm512_store_si512(target + kTileElements, both.upper);
    }
  }
}

// sums[i * step + 0:16] += the tile in `from` plus the one in `rest`, 16 rows each.
inline void add_tiles(const float* from, const float* rest, float* sums, int64_t step) {
  for (int64_t i = 0; i < kTileSide; ++i) {
    float* place = sums + i * step;
    store(place, load(place) + (load(from + i * kLanes) + load(rest + i * kLanes)));
  }
}

// Three interleaved tiles of terms of 32 rows of a panel [depth, padded], 16 columns from `first`.
inline void split_panel(const float* panel, int64_t depth, int64_t padded, int64_t k, int64_t first,
                        uint16_t* tiles) {
  for (int64_t p = 0; p < kTileSide; ++p) {
    const int64_t row = k + 2 * p;
    const Terms a = split(row < depth ? load(panel + row * padded + first) : vf{});
    const Terms b = split(row + 1 < depth ? load(panel + (row + 1) * padded + first) : vf{});
    for (int term = 0; term < 3; ++term)
      store_pairs(tiles + term * kTileElements + p * kTileDepth, pair(a.part[term], b.part[term]));
  }
}

// One product of a tile of x in register X and one of terms in T, either of which may be the left.
template <bool TermsLeft, int C, int X, int T>
inline void multiply() {
  tile_dot<C, TermsLeft ? T : X, TermsLeft ? X : T>();
}

// sums0 and sums1 [16, step] += two rows of tiles of x, `x_step` bytes apart, times those of terms
// [step, 3]. The leading terms are summed apart from the others, which are small beside them.
template <bool TermsLeft>
inline void add_products(const void* x0, const void* x1, int64_t x_stride, int64_t x_step,
                         const uint16_t* terms, int64_t steps, float* sums0, float* sums1,
                         int64_t sums_stride) {
  alignas(64) float results[4][kTileSide * kLanes];
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t step = 0; step < steps; ++step, terms += 3 * kTileElements) {
    tile_load<4>(static_cast<const char*>(x0) + step * x_step, x_stride);
    tile_load<5>(static_cast<const char*>(x1) + step * x_step, x_stride);
    tile_load<6>(terms, kTileRowBytes);
    multiply<TermsLeft, 0, 4, 6>(), multiply<TermsLeft, 1, 5, 6>();
    tile_load<7>(terms + kTileElements, kTileRowBytes);
    multiply<TermsLeft, 2, 4, 7>(), multiply<TermsLeft, 3, 5, 7>();
    tile_load<6>(terms + 2 * kTileElements, kTileRowBytes);
    multiply<TermsLeft, 2, 4, 6>(), multiply<TermsLeft, 3, 5, 6>();
  }
  tile_store<0>(results[0], kTileRowBytes), tile_store<1>(results[1], kTileRowBytes);
  tile_store<2>(results[2], kTileRowBytes), tile_store<3>(results[3], kTileRowBytes);
  add_tiles(results[0], results[2], sums0, sums_stride);
  add_tiles(results[1], results[3], sums1, sums_stride);
}

// The block's rows times the tiles of terms [group, step, 3], into sums [kRowsOfBlock, padded].
inline void reduce_block(const uint16_t* rows, int64_t stride_bytes, const uint16_t* tiles,
                         int64_t steps, int64_t all_steps, int64_t groups, float* sums) {
  const char* lower = reinterpret_cast<const char*>(rows) + kTileSide * stride_bytes;
  const int64_t padded = groups * kLanes;
  for (int64_t group = 0; group < groups; ++group) {
    float* sum = sums + group * kLanes;
    add_products<false>(rows, lower, stride_bytes, kTileRowBytes,
                        tiles + group * all_steps * 3 * kTileElements, steps, sum,
                        sum + kTileSide * padded, padded);
  }
}

// The tiles of terms of a panel [depth, padded rank] are [group, step, 3].
inline int64_t tiles_of_terms(int64_t depth, int64_t rank) {  // of one term
  return padded_rank(rank) / kLanes * ((depth + kTileDepth - 1) / kTileDepth);
}
inline int64_t terms_elements(int64_t depth, int64_t rank) {
  return tiles_of_terms(depth, rank) * 3 * kTileElements;
}
inline void split_item(const float* panel, int64_t depth, int64_t rank, int64_t item,
                       uint16_t* tiles) {
  const int64_t steps = (depth + kTileDepth - 1) / kTileDepth;
  split_panel(panel, depth, padded_rank(rank), item % steps * kTileDepth, item / steps * kLanes,
              tiles + item * 3 * kTileElements);
}

// out [rows of the block, rank] = scale (x * keep) panel.
inline void reduce_rows(const Matrix& x, const uint16_t* tiles, int64_t rank, float scale,
                        const KeepMask& mask, float* out, int64_t row) {
  const int64_t padded = padded_rank(rank), groups = padded / kLanes;
  const int64_t all_steps = (x.cols + kTileDepth - 1) / kTileDepth;
  const int64_t rows = std::min(kRowsOfBlock, x.rows - row);
  alignas(64) uint16_t block[kRowsOfBlock * kSumDepth];
  alignas(64) float sums[kRowsOfBlock * kMaxRank];
  std::fill_n(sums, kRowsOfBlock * padded, 0.0f);
  for (int64_t step = 0; step < all_steps; step += kSumSteps) {
    const int64_t steps = std::min(kSumSteps, all_steps - step), col = step * kTileDepth;
    const bool whole = rows == kRowsOfBlock && col + steps * kTileDepth <= x.cols;
    if (!whole || !mask.keeps_all()) stage_rows(x, mask, row, col, block);
    const bool direct = whole && mask.keeps_all();
    reduce_block(direct ? row_of(x, row) + col : block, 2 * (direct ? x.stride : kSumDepth),
                 tiles + step * 3 * kTileElements, steps, all_steps, groups, sums);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t r = 0; r < rank; ++r) out[i * rank + r] = scale * sums[i * padded + r];
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

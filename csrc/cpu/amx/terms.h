// Products of fp32 operands on tiles: each value is the sum of three bf16 terms, rounded to
// nearest, and of the nine products of terms the six largest are added. What is left out is below
// 2^-25 of a product, and products of terms are exact, so the result is as exact as one of fp32.
// Infinities have no such terms: whoever finds one gives up.
#pragma once

#include "amx/long_sums.h"
#include "amx/packing.h"

namespace fasttune::cpu::FASTTUNE_ISA {

// Whether the thread has split an infinity or a NaN since it cleared this.
inline thread_local bool split_not_finite = false;

// 32 values as registers of bf16: themselves, or the terms of fp32 values, the largest first.
template <int Terms>
struct TermsOfRow {
  __m512i term[Terms];
};

template <int Terms>
using Operand = std::conditional_t<Terms == 1, uint16_t, float>;

// The upper halves of 32 lanes.
inline __m512i joined_halves(vu low, vu high) {
  alignas(64) static const uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16((__m512i)low, _mm512_load_si512(kOdd), (__m512i)high);
}

inline Lanes lanes_of(__m512i row) {
  return {upper_halves(_mm512_castsi512_si256(row)),
          upper_halves(_mm512_extracti64x4_epi64(row, 1))};
}

// As split, with the first two terms rounded to nearest, ties away from zero: the second has at
// most 2^-9 of the value, and the last one is what is left.
__attribute__((always_inline)) inline Terms split_rounded(vf v) {
  constexpr uint32_t kUpper = 0xffff0000u, kHalf = 0x8000u;
  constexpr uint32_t kLargest = 0x7f7f0000u;  // of bf16: rounded, what is above would be infinite
  const vu magnitude = as_bits(v) & 0x7fffffffu;
  if (__builtin_expect(
          _mm512_cmpgt_epu32_mask((__m512i)magnitude, _mm512_set1_epi32(kLargest)) != 0, 0)) {
    split_not_finite |=
        _mm512_cmpge_epu32_mask((__m512i)magnitude, _mm512_set1_epi32(0x7f800000)) != 0;
    return split(v);
  }
  Terms terms;
  for (int i = 0; i < 2; ++i) {
    terms.part[i] = (as_bits(v) + kHalf) & kUpper;
    v -= as_float(terms.part[i]);
  }
  terms.part[2] = as_bits(v);
  return terms;
}

template <int Terms>
inline TermsOfRow<Terms> terms_of(vf low, vf high) {
  if constexpr (Terms == 1) {
    return {{rounded(low, high)}};
  } else {
    const auto a = split_rounded(low), b = split_rounded(high);
    return {{joined_halves(a.part[0], b.part[0]), joined_halves(a.part[1], b.part[1]),
             joined_halves(a.part[2], b.part[2])}};
  }
}

// 32 values of a row, of those `lanes` says; the others are zero.
template <int Terms>
inline TermsOfRow<Terms> load_terms(const Operand<Terms>* from, __mmask32 lanes) {
  if constexpr (Terms == 1) {
    return {{_mm512_maskz_loadu_epi16(lanes, from)}};
  } else {
    const Lanes row =
        load_row(from, static_cast<__mmask16>(lanes), static_cast<__mmask16>(lanes >> kLanes));
    return terms_of<3>(row.low, row.high);
  }
}

// Tiles of terms are [step, term, 2 tiles].
template <int Terms>
constexpr int64_t kTermsElements = Terms * kStepElements;

template <int Terms>
inline const Operand<Terms>* element_of(const Matrix& m, int64_t row, int64_t col) {
  return static_cast<const Operand<Terms>*>(m.data) + row * m.stride + col;
}

// `steps` of 32 rows of x from step `first` on, with dropout, zero beyond it.
template <int Terms>
void pack_rows_of_terms(const Matrix& x, const KeepMask& mask, int64_t row, int64_t first,
                        int64_t steps, uint16_t* block) {
  for (int64_t i = 0; i < kRowsOfBlock; ++i) {
    uint16_t* to = block + i / kTileSide * kTileElements + i % kTileSide * kTileDepth;
    for (int64_t step = first; step < first + steps; ++step, to += kTermsElements<Terms>) {
      const int64_t half = step % 2 * kTileDepth, col = step * kTileDepth;
      const auto lanes = static_cast<__mmask32>(kept(x, mask, row + i, col - half) >> half);
      const auto own = load_terms<Terms>(
          lanes ? element_of<Terms>(x, row + i, col) : static_cast<const Operand<Terms>*>(x.data),
          lanes);
      for (int term = 0; term < Terms; ++term)
        _mm512_store_si512(to + term * kStepElements, own.term[term]);
    }
  }
}

// A step of a panel: rows [row, row + 32) of w [N, K] as columns, and 32 of its columns from k.
template <int Terms>
void pack_transposed_terms(const Matrix& w, int64_t row, int64_t k, uint16_t* tiles) {
  alignas(64) uint16_t rows[Terms][kTileElements];
  const __mmask32 lanes = lower_lanes(w.cols - k);
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t i = 0; i < kTileSide; ++i) {
      const int64_t own = row + half * kTileSide + i;
      const auto terms = own < w.rows && lanes
                             ? load_terms<Terms>(element_of<Terms>(w, own, k), lanes)
                             : TermsOfRow<Terms>{};
      for (int term = 0; term < Terms; ++term)
        _mm512_store_si512(rows[term] + i * kTileDepth, terms.term[term]);
    }
    for (int term = 0; term < Terms; ++term)
      transpose_16(reinterpret_cast<const float*>(rows[term]), kLanes,
                   reinterpret_cast<float*>(tiles + term * kStepElements + half * kTileElements),
                   kLanes);
  }
}

// Two rows of 32 fp32 values as a row of a step's interleaved tiles.
inline void interleave_terms(const Lanes& first, const Lanes& second, uint16_t* to) {
  const Terms upper[2] = {split_rounded(first.low), split_rounded(first.high)};
  const Terms lower[2] = {split_rounded(second.low), split_rounded(second.high)};
  for (int term = 0; term < 3; ++term, to += kStepElements)
    for (int half = 0; half < 2; ++half)
      store_pairs(to + half * kTileElements, pair(upper[half].part[term], lower[half].part[term]));
}

// A step of a panel: rows [k, k + 32) of w [K, N] in fp32 and its columns [col, col + 32).
inline void pack_pairs_of_terms(const Matrix& w, int64_t k, int64_t col, uint16_t* tiles) {
  const __mmask16 first = lower_floats(w.cols - col), second = lower_floats(w.cols - col - kLanes);
  const auto row = [&](int64_t i) {
    return i < w.rows ? load_row(element_of<3>(w, i, col), first, second) : Lanes{};
  };
  for (int64_t p = 0; p < kTileSide; ++p)
    interleave_terms(row(k + 2 * p), row(k + 2 * p + 1), tiles + p * kTileDepth);
}

// One of the six products of a step: registers 4 and 5 times 6 and 7, the blocks' and the panel's
// tiles. What comes next is loaded as early as the last reader allows (null: it stays), and a line
// of the caches of the next step is asked for with each register, as in `multiply`.
__attribute__((always_inline)) inline void add_terms(const uint16_t* next_rows,
                                                     const uint16_t* next_panel,
                                                     const uint16_t*& ahead,
                                                     const uint16_t*& ahead_panel) {
  const auto ask = [](const uint16_t*& lines) {
    for (int64_t i = 0; i < kTileSide / 2; ++i, lines += kTileDepth)
      _mm_prefetch(reinterpret_cast<const char*>(lines), _MM_HINT_T0);
  };
  tile_dot<0, 4, 6>();
  ask(ahead);
  tile_dot<2, 5, 6>();
  ask(ahead_panel);
  if (next_panel) tile_load<6>(next_panel, kTileRowBytes);
  tile_dot<1, 4, 7>();
  ask(ahead);
  if (next_rows) tile_load<4>(next_rows, kTileRowBytes);
  tile_dot<3, 5, 7>();
  ask(ahead_panel);
  if (next_panel) tile_load<7>(next_panel + kTileElements, kTileRowBytes);
  if (next_rows) tile_load<5>(next_rows + kTileElements, kTileRowBytes);
}

// Registers 0 to 3 += a packed block times a packed panel of three terms each.
__attribute__((noinline)) inline void multiply_terms(const uint16_t* rows, const uint16_t* panel,
                                                     int64_t steps) {
  constexpr int64_t kStep = kTermsElements<3>, kTerm = kStepElements;
  if (steps == 0) return;
  tile_load<6>(panel, kTileRowBytes), tile_load<7>(panel + kTileElements, kTileRowBytes);
  tile_load<4>(rows, kTileRowBytes), tile_load<5>(rows + kTileElements, kTileRowBytes);
  for (; steps > 0; --steps, rows += kStep, panel += kStep) {
    const uint16_t *ahead = rows + kStep, *ahead_panel = panel + kStep;
    const bool more = steps > 1;
    add_terms(nullptr, panel + kTerm, ahead, ahead_panel);
    add_terms(nullptr, panel + 2 * kTerm, ahead, ahead_panel);
    add_terms(rows + kTerm, panel + kTerm, ahead, ahead_panel);
    add_terms(nullptr, panel, ahead, ahead_panel);
    add_terms(rows + 2 * kTerm, nullptr, ahead, ahead_panel);
    add_terms(more ? rows + kStep : nullptr, more ? panel + kStep : nullptr, ahead, ahead_panel);
  }
}

// sums += results of a block and a panel, or = them.
inline void add_results(const float* results, bool more, float* sums) {
  for (int64_t i = 0; i < kRowsOfBlock * kColumnsOfPanel; i += kLanes)
    store(sums + i, more ? load(sums + i) + load(results + i) : load(results + i));
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

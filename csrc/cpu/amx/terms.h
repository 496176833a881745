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

inline __m512i joined_halves(vu low, vu high) {
  const auto half = [](vu v) { return _mm512_cvtepi32_epi16((__m512i)(v >> 16)); };
  return _mm512_inserti64x4(_mm512_castsi256_si512(half(low)), half(high), 1);
}

inline Lanes lanes_of(__m512i row) {
  return {upper_halves(_mm512_castsi512_si256(row)),
          upper_halves(_mm512_extracti64x4_epi64(row, 1))};
}

__attribute__((always_inline)) inline TermsOfRow<3> split_rounded(vf low, vf high) {
  TermsOfRow<3> row;
  // Rounded, what lies above the largest bf16 would become infinite.
  constexpr uint32_t kLargest = 0x7f7f0000u, kInfinity = 0x7f800000u;
  const vu bits = (as_bits(low) & 0x7fffffffu), others = (as_bits(high) & 0x7fffffffu);
  const __m512i most = _mm512_max_epu32((__m512i)bits, (__m512i)others);
  if (__builtin_expect(_mm512_cmpgt_epu32_mask(most, _mm512_set1_epi32(kLargest)), 0)) {
    split_not_finite |= _mm512_cmpge_epu32_mask(most, _mm512_set1_epi32(kInfinity)) != 0;
    const Terms a = split(low), b = split(high);
    for (int i = 0; i < 3; ++i) row.term[i] = joined_halves(a.part[i], b.part[i]);
    return row;
  }
  for (int i = 0; i < 3; ++i) {
    row.term[i] = rounded(low, high);
    const Lanes own = lanes_of(row.term[i]);
    low -= own.low, high -= own.high;
  }
  return row;
}

template <int Terms>
inline TermsOfRow<Terms> terms_of(vf low, vf high) {
  if constexpr (Terms == 1)
    return {{rounded(low, high)}};
  else
    return split_rounded(low, high);
}

// 32 values of a row, of those `lanes` says; the others are zero.
template <int Terms>
inline TermsOfRow<Terms> load_terms(const Operand<Terms>* from, __mmask32 lanes) {
  if constexpr (Terms == 1) {
    return {{_mm512_maskz_loadu_epi16(lanes, from)}};
  } else {
    const Lanes row =
        load_row(from, static_cast<__mmask16>(lanes), static_cast<__mmask16>(lanes >> kLanes));
    return split_rounded(row.low, row.high);
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

// Pairs of rows as a pair of rows of interleaved tiles.
template <int Terms>
inline void interleave_terms(const TermsOfRow<Terms>& first, const TermsOfRow<Terms>& second,
                             uint16_t* to) {
  for (int term = 0; term < Terms; ++term, to += kStepElements) {
    const Interleaved both = interleave_lanes(first.term[term], second.term[term]);
    _mm512_store_si512(to, both.lower);
    _mm512_store_si512(to + kTileElements, both.upper);
  }
}

// A step of a panel: rows [k, k + 32) of w [K, N] and its columns [col, col + 32).
template <int Terms>
void pack_pairs_of_terms(const Matrix& w, int64_t k, int64_t col, uint16_t* tiles) {
  const __mmask32 lanes = lower_lanes(w.cols - col);
  const auto row = [&](int64_t i) {
    return i < w.rows && lanes ? load_terms<Terms>(element_of<Terms>(w, i, col), lanes)
                               : TermsOfRow<Terms>{};
  };
  for (int64_t p = 0; p < kTileSide; ++p)
    interleave_terms<Terms>(row(k + 2 * p), row(k + 2 * p + 1), tiles + p * kTileDepth);
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

// The gradients of a bottleneck adapter's weights: a wide matrix times a thin one over all rows, a
// span of columns at a time, and the sums of the wide one's columns beside it.
#pragma once

#include "amx/bottleneck_operands.h"

namespace fasttune::cpu::FASTTUNE_ISA {

// sums [kRowsOfBlock, kMaskSpan], 32 of its columns, = (`more`: += ) results.
inline void add_rows(const float* results, bool more, float* sums) {
  for (int64_t i = 0; i < kRowsOfBlock; ++i, results += kColumnsOfPanel, sums += kMaskSpan)
    for (int64_t c = 0; c < kColumnsOfPanel; c += kLanes)
      store(sums + c, more ? load(sums + c) + load(results + c) : load(results + c));
}

// Half a span of `steps` steps of 32 rows, staged as panels.
template <int Terms>
constexpr int64_t kStagedHalf = kSumSteps * kTermsElements<Terms>;

// sums [groups of 32, kMaskSpan] = (`more`: += ) thin tiles times staged halves of columns.
template <int Terms>
void multiply_outer(const Turned<Terms>& thin, int64_t first_step, int64_t steps,
                    const uint16_t* block, bool more, float* sums) {
  constexpr int64_t kBytes = kMaskSpan * sizeof(float);
  for (int64_t half = 0; half < 2; ++half, block += kStagedHalf<Terms>)
    for (int64_t group = 0; group < thin.groups(); ++group) {
      float* upper = sums + group * kColumnsOfPanel * kMaskSpan + half * kColumnsOfPanel;
      float* lower = upper + kTileSide * kMaskSpan;
      const uint16_t* tiles = thin.tiles(group, first_step);
      if constexpr (Terms > 1) {  // a sum of its own, or the result would be less exact
        alignas(64) float results[kRowsOfBlock * kColumnsOfPanel];
        clear_results();
        multiply_terms(tiles, block, steps);
        store_results(results);
        add_rows(results, more, upper);
        continue;
      }
      if (more) {
        tile_load<0>(upper, kBytes), tile_load<1>(upper + kLanes, kBytes);
        tile_load<2>(lower, kBytes), tile_load<3>(lower + kLanes, kBytes);
      } else {
        clear_results();
      }
      multiply(packed_block(tiles), block, steps);
      tile_store<0>(upper, kBytes), tile_store<1>(upper + kLanes, kBytes);
      tile_store<2>(lower, kBytes), tile_store<3>(lower + kLanes, kBytes);
    }
}

// Each column's sum over the rows of a staged span of bf16.
inline void add_staged(const uint16_t* block, int64_t steps, vf* sums) {
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t p = 0; p < steps * kTileSide; ++p)
      for (int64_t c = 0; c < 2; ++c) {
        vf& own = sums[2 * half + c];
        own = (vf)Turned<1>::add_pairs(
            (__m512)own, block + half * kStagedHalf<1> + p / kTileSide * kStepElements +
                             c * kTileElements + p % kTileSide * kTileDepth);
      }
}

// out [1, cols], 64 of its columns from `col`.
inline void store_sums(const vf* sums, float factor, const MutableMatrix& out, int64_t col) {
  alignas(64) float all[kMaskSpan];
  for (int64_t i = 0; i < 4; ++i) store(all + i * kLanes, sums[i] * factor);
  with_element(out.dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t c = 0; c < std::min(kMaskSpan, out.cols - col); ++c)
      E::store_one(static_cast<typename E::type*>(out.data) + col + c, all[c]);
  });
}

// sums [cols of thin, 64] to rows of out [cols of thin, K].
inline void store_rows(const float* sums, const MutableMatrix& out, int64_t col) {
  with_element(out.dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t r = 0; r < out.rows; ++r) {
      auto* to = static_cast<typename E::type*>(out.data) + r * out.stride + col;
      const float* from = sums + r * kMaskSpan;
      const int64_t columns = std::min(kMaskSpan, out.cols - col);
      int64_t c = 0;
      for (; c + kLanes <= columns; c += kLanes) E::store(to + c, load(from + c));
      for (; c < columns; ++c) E::store_one(to + c, from[c]);
    }
  });
}

// The same, times factor, to columns of out [H, cols of thin]: its rows from `row` on.
inline void store_columns(const float* sums, float factor, const MutableMatrix& out, int64_t row) {
  const int64_t rows = std::min(kMaskSpan, out.rows - row);
  with_element(out.dtype, [&](auto element) {
    using E = decltype(element);
    alignas(64) float turned[kTileSide * kLanes];
    for (int64_t r = 0; r < out.cols; r += kTileSide)
      for (int64_t c = 0; c < rows; c += kTileSide) {
        transpose_16(sums + r * kMaskSpan + c, kMaskSpan, turned, kLanes);
        const int64_t columns = std::min(kTileSide, out.cols - r);
        for (int64_t i = 0; i < std::min(kTileSide, rows - c); ++i) {
          auto* to = static_cast<typename E::type*>(out.data) + (row + c + i) * out.stride + r;
          const vf own = load(turned + i * kLanes) * factor;
          if (columns == kTileSide)
            E::store(to, own);
          else
            for (int64_t j = 0; j < columns; ++j) E::store_one(to + j, own[j]);
        }
      }
  });
}

constexpr int64_t kRowsAhead = 24;

// Asks for a span of two rows: their distance hides them from the CPU's own prefetching.
inline void ask_for_rows(const Matrix& x, int64_t row, int64_t col) {
  for (int64_t i = row; i < std::min(row + 2, x.rows); ++i)
    for (int64_t line = 0; line < kMaskSpan; line += kLanes)
      _mm_prefetch(reinterpret_cast<const char*>(element_of<3>(x, i, col) + line), _MM_HINT_T0);
}

// A step of 32 rows of fp32 from `row` on as panels of terms, a half of the span's columns after
// the other, and the sums of its columns added to four vectors.
inline void stage_terms(const Matrix& x, const KeepMask& mask, int64_t row, int64_t col,
                        uint16_t* block, vf* sums) {
  vf own[4] = {};
  for (int64_t p = 0; p < kTileSide; ++p, block += kTileDepth) {
    const int64_t m = row + 2 * p;
    ask_for_rows(x, m + kRowsAhead, col);
    const uint64_t bits[2] = {kept(x, mask, m, col), kept(x, mask, m + 1, col)};
    for (int half = 0; half < 2; ++half) {
      Lanes rows[2];
      for (int i = 0; i < 2; ++i) {
        const auto lanes = static_cast<__mmask32>(bits[i] >> (32 * half));
        const float* from = lanes ? element_of<3>(x, m + i, col + half * kTileDepth)
                                  : static_cast<const float*>(x.data);
        rows[i] =
            load_row(from, static_cast<__mmask16>(lanes), static_cast<__mmask16>(lanes >> kLanes));
      }
      own[2 * half] += rows[0].low + rows[1].low;
      own[2 * half + 1] += rows[0].high + rows[1].high;
      interleave_terms(rows[0], rows[1], block + half * kStagedHalf<3>);
    }
  }
  for (int i = 0; i < 4; ++i) sums[i] += own[i];
}

// wide^T thin over all rows for the 64 columns from `col`; the sums of wide's columns beside it.
template <int Terms>
void outer(const Matrix& wide, const Turned<Terms>* thin, const KeepMask& mask, int64_t col,
           float* sums, vf* column_sums) {
  alignas(64) uint16_t block[2 * kStagedHalf<Terms>];
  const int64_t all = steps_of(wide.rows);
  for (int64_t step = 0; step < all; step += kSumSteps) {
    const int64_t steps = std::min(kSumSteps, all - step);
    vf own[4] = {};
    if constexpr (Terms > 1) {
      for (int64_t i = 0; i < steps; ++i)
        stage_terms(wide, mask, (step + i) * kTileDepth, col, block + i * kTermsElements<3>, own);
    } else {
      stage_columns<true>(wide, mask, step * kTileDepth, steps, col, block);
      if (column_sums) add_staged(block, steps, own);
    }
    if (thin) multiply_outer(*thin, step, steps, block, step > 0, sums);
    for (int64_t i = 0; column_sums && i < 4; ++i) column_sums[i] += own[i];
  }
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

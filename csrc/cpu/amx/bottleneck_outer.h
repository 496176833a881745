// The gradients of a bottleneck adapter's weights: a wide matrix times a thin one over all rows, a
// span of columns at a time, and the sums of the wide one's columns beside it.
#pragma once

#include "amx/bottleneck_operands.h"

namespace fasttune::cpu::FASTTUNE_ISA {

// sums [groups of 16, kMaskSpan] = (`more`: += ) thin tiles times staged halves of columns.
inline void multiply_outer(const Turned& thin, int64_t first_step, int64_t steps,
                           const uint16_t* block, bool more, float* sums) {
  constexpr int64_t kBytes = kMaskSpan * sizeof(float);
  for (int64_t half = 0; half < 2; ++half, block += kSumSteps * kStepElements)
    for (int64_t group = 0; group < thin.groups(); group += 2) {
      float* upper = sums + group * kTileSide * kMaskSpan + half * kColumnsOfPanel;
      float* lower = upper + kTileSide * kMaskSpan;
      if (more) {
        tile_load<0>(upper, kBytes), tile_load<1>(upper + kLanes, kBytes);
        tile_load<2>(lower, kBytes), tile_load<3>(lower + kLanes, kBytes);
      } else {
        clear_results();
      }
      const uint16_t* tiles = thin.tile(group, first_step);
      multiply({tiles, thin.tile(group + 1, first_step), kTileRowBytes, kTileElements}, block,
               steps);
      tile_store<0>(upper, kBytes), tile_store<1>(upper + kLanes, kBytes);
      tile_store<2>(lower, kBytes), tile_store<3>(lower + kLanes, kBytes);
    }
}

// out [1, cols], 64 of its columns from `col`.
inline void store_sums(const __m512* sums, float factor, const MutableMatrix& out, int64_t col) {
  alignas(64) float all[kMaskSpan];
  for (int64_t i = 0; i < 4; ++i) store(all + i * kLanes, (vf)sums[i] * factor);
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

// wide^T thin over all rows for the 64 columns from `col`; the sums of wide's columns beside it.
inline void outer(const Matrix& wide, const Turned* thin, const KeepMask& mask, int64_t col,
                  float* sums, __m512* column_sums) {
  alignas(64) uint16_t block[kSumSteps * 2 * kStepElements];
  const int64_t all = steps_of(wide.rows);
  for (int64_t step = 0; step < all; step += kSumSteps) {
    const int64_t steps = std::min(kSumSteps, all - step);
    stage_columns<true>(wide, mask, step * kTileDepth, steps, col, block);
    if (thin) multiply_outer(*thin, step, steps, block, step > 0, sums);
    if (!column_sums) continue;
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t p = 0; p < steps * kTileSide; ++p)
        for (int64_t c = 0; c < 2; ++c) {
          __m512& own = column_sums[2 * half + c];
          own = Turned::add_pairs(own, block + (half * kSumSteps + p / kTileSide) * kStepElements +
                                           c * kTileElements + p % kTileSide * kTileDepth);
        }
  }
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

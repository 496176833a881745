// Operands of products as tiles in memory.
#pragma once

#include "amx/expand_blocks.h"
#include "transpose.h"

namespace fasttune::cpu::FASTTUNE_ISA {

inline const uint16_t* at(const Matrix& m, int64_t row, int64_t col) {
  return static_cast<const uint16_t*>(m.data) + row * m.stride + col;
}

// The steps of 32 rows of x, zero beyond it.
inline void pack_rows(const Matrix& x, int64_t row, int64_t steps, uint16_t* block) {
  for (int64_t i = 0; i < kRowsOfBlock; ++i) {
    uint16_t* to = block + i / kTileSide * kTileElements + i % kTileSide * kTileDepth;
    const bool there = row + i < x.rows;
    for (int64_t step = 0; step < steps; ++step, to += kStepElements) {
      const int64_t left = there ? x.cols - step * kTileDepth : 0;
      const uint16_t* from = left > 0 ? at(x, row + i, step * kTileDepth) : to;
      _mm512_store_si512(to, left >= kTileDepth
                                 ? _mm512_loadu_si512(from)
                                 : _mm512_maskz_loadu_epi16(lower_lanes(left), from));
    }
  }
}

// An interleaved tile of 16 rows of w [N, K] as its columns.
inline void pack_transposed(const Matrix& w, int64_t row, int64_t k, uint16_t* tile) {
  auto* to = reinterpret_cast<float*>(tile);
  if (row + kTileSide <= w.rows && k + kTileDepth <= w.cols && w.stride % 2 == 0)
    return transpose_16(reinterpret_cast<const float*>(at(w, row, k)), w.stride / 2, to, kLanes);
  alignas(64) uint16_t rows[kTileElements];
  for (int64_t i = 0; i < kTileSide; ++i) {
    const int64_t left = row + i < w.rows ? w.cols - k : 0;
    const uint16_t* from = left > 0 ? at(w, row + i, k) : rows;
    _mm512_store_si512(rows + i * kTileDepth, _mm512_maskz_loadu_epi16(lower_lanes(left), from));
  }
  transpose_16(reinterpret_cast<const float*>(rows), kLanes, to, kLanes);
}

// The interleaved tiles of 32 rows of w [K, N] for panels `panel_elements` apart.
inline void pack_pairs(const Matrix& w, int64_t k, int64_t col, int64_t panels, uint16_t* tiles,
                       int64_t panel_elements) {
  const bool whole = k + kTileDepth <= w.rows && col + panels * kColumnsOfPanel <= w.cols;
  const auto row = [&](int64_t i, int64_t c, const uint16_t* none) {
    if (whole) return _mm512_loadu_si512(at(w, k + i, c));
    const int64_t left = k + i < w.rows ? w.cols - c : 0;
    return _mm512_maskz_loadu_epi16(lower_lanes(left), left > 0 ? at(w, k + i, c) : none);
  };
  for (int64_t p = 0; p < kTileSide; ++p, tiles += kTileDepth)
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t c = col + panel * kColumnsOfPanel;
      uint16_t* to = tiles + panel * panel_elements;
      const Interleaved both = interleave_lanes(row(2 * p, c, to), row(2 * p + 1, c, to));
      _mm512_store_si512(to, both.lower);
      _mm512_store_si512(to + kTileElements, both.upper);
    }
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

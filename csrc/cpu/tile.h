// Loads a tile of a matrix of any dtype as fp32, with dropout applied.
#pragma once

#include "keep_mask.h"
#include "simd.h"

namespace fasttune::cpu::FASTTUNE_ISA {

// out[j] = x[row, col + j] * keep for a whole span.
template <typename E>
inline void load_span(E, const typename E::type* in, uint64_t bits, float* out) {
  for (int64_t j = 0; j < kMaskSpan; j += kLanes)
    store(out + j, keep_lanes(E::load(in + j), static_cast<uint32_t>(bits >> j) & 0xffffu));
}

// tile[i * width + j] = x[row + i, col + j] * keep, zero beyond the matrix. col and width are
// multiples of kMaskSpan.
template <typename E>
inline void load_tile(E, const Matrix& x, const KeepMask& mask, int64_t row, int64_t rows,
                      int64_t col, int64_t width, float* tile) {
  const auto* data = static_cast<const typename E::type*>(x.data);
  for (int64_t i = 0; i < rows; ++i) {
    const auto* in = data + (row + i) * x.stride + col;
    float* out = tile + i * width;
    for (int64_t span = 0; span < width; span += kMaskSpan) {
      const int64_t valid = x.cols - (col + span);
      if (valid >= kMaskSpan) {
        load_span(E{}, in + span, mask.span(row + i, col + span), out + span);
        continue;
      }
      const uint64_t bits = valid > 0 ? mask.span(row + i, col + span) : 0;
      const int64_t whole = valid > 0 ? valid / kLanes * kLanes : 0;
      for (int64_t j = 0; j < whole; j += kLanes)
        store(out + span + j,
              keep_lanes(E::load(in + span + j), static_cast<uint32_t>(bits >> j) & 0xffffu));
      for (int64_t j = whole; j < kMaskSpan; ++j)
        out[span + j] = j < valid && bits >> j & 1u ? E::load_one(in + span + j) : 0.0f;
    }
  }
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

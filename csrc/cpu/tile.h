// Loads a tile of a matrix of any dtype as fp32, with dropout applied.
#pragma once

#include "simd.h"

namespace fasttune::cpu::FASTTUNE_ISA {

constexpr int64_t kMaskSpan = 64;  // elements whose keep bits are drawn together

// tile[i * width + j] = x[row + i, col + j] * keep, zero beyond the matrix. col is a multiple of
// kMaskSpan, width of kLanes.
template <typename E>
inline void load_tile(E, const Matrix& x, const Dropout& dropout, int64_t row, int64_t rows,
                      int64_t col, int64_t width, float* tile) {
  const auto* data = static_cast<const typename E::type*>(x.data);
  for (int64_t i = 0; i < rows; ++i) {
    float* out = tile + i * width;
    const auto* in = data + (row + i) * x.stride + col;
    const int64_t valid = x.cols - col < width ? x.cols - col : width;
    const int64_t whole = valid / kLanes * kLanes;
    for (int64_t j = 0; j < whole; j += kLanes) store(out + j, E::load(in + j));
    for (int64_t j = whole; j < valid; ++j) out[j] = E::load_one(in + j);
    for (int64_t j = valid; j < width; ++j) out[j] = 0.0f;
    if (dropout.threshold == 0) continue;
    const uint64_t global_row = dropout.row_offset + static_cast<uint64_t>(row + i);
    for (int64_t span = 0; span < width; span += kMaskSpan) {
      const uint64_t bits = keep_bits(dropout, global_row, static_cast<uint64_t>(col + span));
      const int64_t end = span + kMaskSpan < width ? span + kMaskSpan : width;
      for (int64_t j = span; j < end; j += kLanes)
        store(out + j,
              keep_lanes(load(out + j), static_cast<uint32_t>(bits >> (j - span)) & 0xffffu));
    }
  }
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

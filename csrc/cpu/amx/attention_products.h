// Products of attention's blocks on tiles, for operands in bf16. Where an operand is fp32, weights
// or gradients of scores, it goes in as two bf16 terms, 16 bits together: an error of 2^-17, where
// the result is rounded to 2^-9.
#pragma once

#include "amx/tiles.h"
#include "attention_blocks.h"

namespace fasttune::cpu::FASTTUNE_ISA {

constexpr int64_t kPair = 2 * kTileSide;  // rows and columns of four tiles of sums
static_assert(kTileSide % kTileRows == 0 && kTileDepth % kTileRows == 0,
              "limits are known for strips of kTileRows");
constexpr int64_t kWideTiles = 4;  // tiles of sums beside two of the left operand

inline int64_t padded_depth(int64_t width) { return divide_up(width, kTileDepth) * kTileDepth; }
inline uint16_t* halves(float* buffer) { return reinterpret_cast<uint16_t*>(buffer); }

// Rows of one head as they are stored: `rows` of them, zero beyond, `width` features each.
struct StoredRows {
  const uint16_t* data;
  int64_t stride, rows, width;

  // 32 features of a row from a multiple of 32 on.
  __m512i load(int64_t row, int64_t feature) const {
    const __mmask32 valid = row < rows ? lower_lanes(width - feature) : 0u;
    return _mm512_maskz_loadu_epi16(valid, data + (valid ? row * stride + feature : 0));
  }
};

inline StoredRows stored(const Heads& x, const AttentionShape& shape, int64_t batch, int64_t head,
                         int64_t row, int64_t rows) {
  return {static_cast<const uint16_t*>(at(x, shape.dtype, batch, head, row)), x.row_stride, rows,
          shape.width};
}

// out [block_rows, padded_depth(width)]: a left operand.
inline void copy_rows(const StoredRows& x, int64_t block_rows, uint16_t* out) {
  const int64_t depth = padded_depth(x.width);
  for (int64_t row = 0; row < block_rows; ++row)
    for (int64_t j = 0; j < depth; j += kTileDepth)
      _mm512_storeu_si512(out + row * depth + j, x.load(row, j));
}

// The right operand x^T: interleaved tiles [step of 32 features, tile of 16 rows].
inline void interleave_transposed(const StoredRows& x, int64_t block_rows, uint16_t* tiles) {
  alignas(64) uint16_t staged[kTileElements];
  const int64_t depth = padded_depth(x.width);
  for (int64_t j = 0; j < depth; j += kTileDepth)
    for (int64_t row = 0; row < block_rows; row += kTileSide, tiles += kTileElements) {
      for (int64_t i = 0; i < kTileSide; ++i)
        _mm512_store_si512(staged + i * kTileDepth, x.load(row + i, j));
      transpose_16(reinterpret_cast<const float*>(staged), kLanes, reinterpret_cast<float*>(tiles),
                   kLanes);
    }
}

// The right operand x: interleaved tiles [step of 32 rows, tile of 16 features].
inline void interleave(const StoredRows& x, int64_t block_rows, uint16_t* tiles) {
  const int64_t columns = padded_rank(x.width) / kLanes;
  for (int64_t row = 0; row < block_rows; row += 2) {
    uint16_t* line =
        tiles + row / kTileDepth * columns * kTileElements + row % kTileDepth / 2 * kTileDepth;
    for (int64_t column = 0; column < columns; column += 2) {
      const Interleaved both =
          interleave_lanes(x.load(row, column * kLanes), x.load(row + 1, column * kLanes));
      _mm512_storeu_si512(line + column * kTileElements, both.lower);
      if (column + 1 < columns)
        _mm512_storeu_si512(line + (column + 1) * kTileElements, both.upper);
    }
  }
}

// out [32, 32] at (row, column) = left rows times the right operand's tiles [step, right_tiles].
inline void multiply_block(const uint16_t* left, int64_t depth, const uint16_t* right,
                           int64_t right_tiles, int64_t row, int64_t column, float* out,
                           int64_t out_stride) {
  const uint16_t* a = left + row * depth;
  const uint16_t* b = right + column / kTileSide * kTileElements;
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t k = 0; k < depth; k += kTileDepth, b += right_tiles * kTileElements) {
    tile_load<4>(a + k, 2 * depth);
    tile_load<5>(a + kTileSide * depth + k, 2 * depth);
    tile_load<6>(b, kTileRowBytes);
    tile_load<7>(b + kTileElements, kTileRowBytes);
    tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>(), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
  }
  float* place = out + row * out_stride + column;
  const int64_t bytes = 4 * out_stride;
  tile_store<0>(place, bytes), tile_store<1>(place + kLanes, bytes);
  tile_store<2>(place + kTileSide * out_stride, bytes);
  tile_store<3>(place + kTileSide * out_stride + kLanes, bytes);
}

// A row of Columns floats becomes its first terms and then its second ones, the second rounded;
// vectors from `valid` on become zero; lanes beyond it in the last one before are zero already.
template <int64_t Columns>
inline void to_terms(float* row, int64_t valid) {
  constexpr int64_t kVectors = Columns / kLanes;
  vf first[kVectors], second[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) {
    const vf value = v * kLanes < valid ? load(row + v * kLanes) : vf{};
    first[v] = as_float(as_bits(value) & 0xffff0000u);
    second[v] = value - first[v];
  }
  const auto put = [](const vf* terms, uint16_t* to) {
    for (int64_t v = 0; v < kVectors; v += 2)
      _mm512_storeu_si512(to + v * kLanes, rounded(terms[v], terms[v + 1]));
  };
  put(first, halves(row));
  put(second, halves(row) + Columns);
}

template <int W>
inline void multiply_terms(const uint16_t* right) {
  constexpr int kRight = 6 + W % 2;
  tile_load<kRight>(right, kTileRowBytes);
  tile_dot<W, 4, kRight>(), tile_dot<W, 5, kRight>();
}

// add(row, column, 16 lanes of left right) for 16 rows of left, rows of terms of Columns values of
// which the first `steps` times 32 count, and right [step, right_tiles] interleaved.
template <int64_t Columns, typename Add>
inline void multiply_rows_of_terms(const float* left, int64_t first_step, int64_t steps,
                                   const uint16_t* right, int64_t right_tiles, Add&& add) {
  alignas(64) float results[kTileSide * kWideTiles * kLanes];
  constexpr int64_t kBytes = 4 * kWideTiles * kLanes;
  const auto* terms = reinterpret_cast<const uint16_t*>(left);
  for (int64_t first = 0; first < right_tiles; first += kWideTiles) {
    const int64_t count = std::min(kWideTiles, right_tiles - first);
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t step = first_step; step < steps; ++step) {
      const uint16_t* b = right + (step * right_tiles + first) * kTileElements;
      tile_load<4>(terms + step * kTileDepth, 4 * Columns);
      tile_load<5>(terms + Columns + step * kTileDepth, 4 * Columns);
      multiply_terms<0>(b);
      if (count > 1) multiply_terms<1>(b + kTileElements);
      if (count > 2) multiply_terms<2>(b + 2 * kTileElements);
      if (count > 3) multiply_terms<3>(b + 3 * kTileElements);
    }
    tile_store<0>(results, kBytes), tile_store<1>(results + kLanes, kBytes);
    tile_store<2>(results + 2 * kLanes, kBytes), tile_store<3>(results + 3 * kLanes, kBytes);
    for (int64_t i = 0; i < kTileSide; ++i)
      for (int64_t w = 0; w < count; ++w)
        add(i, (first + w) * kLanes, load(results + (i * kWideTiles + w) * kLanes));
  }
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

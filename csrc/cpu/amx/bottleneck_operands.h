// The operands of a bottleneck adapter's products as tiles: its weights, rows of what is wide, and
// the transpose of what is thin.
#pragma once

#include "amx/long_sums.h"
#include "amx/packing.h"

namespace fasttune::cpu::FASTTUNE_ISA {

constexpr int64_t kChunkBytes = 512 << 10;  // of rows that share the panels of a weight
constexpr int64_t kMostBlocks = kChunkBytes / (2 * kStepElements);

inline int64_t steps_of(int64_t depth) { return (depth + kTileDepth - 1) / kTileDepth; }

// A weight of `cols` columns as panels [panel, step, 2 tiles]; it lies as [depth, cols] or, if
// transposed, as [cols, depth].
class Packed {
 public:
  Packed(const Matrix& w, bool transposed, uint16_t*& room)
      : w_(w),
        transposed_(transposed),
        steps_(steps_of(transposed ? w.cols : w.rows)),
        panels_(steps_of(transposed ? w.rows : w.cols)),
        tiles_(room) {
    room += items() * kStepElements;
  }
  static int64_t elements(const Matrix& w) {
    return steps_of(w.rows) * steps_of(w.cols) * kStepElements;
  }
  int64_t items() const { return panels_ * steps_; }
  int64_t steps() const { return steps_; }
  int64_t panels() const { return panels_; }
  const uint16_t* panel(int64_t i) const { return tiles_ + i * steps_ * kStepElements; }
  void pack(int64_t item) {
    const int64_t col = item / steps_ * kColumnsOfPanel, k = item % steps_ * kTileDepth;
    uint16_t* to = tiles_ + item * kStepElements;
    if (!transposed_) return pack_pairs(w_, k, col, 1, to, 0);
    pack_transposed(w_, col, k, to);
    pack_transposed(w_, col + kTileSide, k, to + kTileElements);
  }

 private:
  const Matrix& w_;
  bool transposed_;
  int64_t steps_, panels_;
  uint16_t* tiles_;
};

// Blocks of rows of a wide matrix, read where they lie or packed: what dropout clears, rows beyond
// the end, and rows that would compete for the same lines of the caches.
class Rows {
 public:
  Rows(const Matrix& x, const KeepMask& mask) : x_(x), mask_(mask), steps_(steps_of(x.cols)) {
    in_place_ = mask.keeps_all() && x.cols % kTileDepth == 0 && 2 * x.stride % 2048 != 0;
  }
  int64_t elements() const { return steps_ * kStepElements; }
  // `count` blocks from `row` on; room for each of them.
  void blocks(int64_t row, int64_t count, uint16_t* room, Block* out) const {
    for (int64_t i = 0; i < count; ++i)
      out[i] = block(row + i * kRowsOfBlock, room + i * elements());
  }

 private:
  Block block(int64_t row, uint16_t* room) const {
    if (in_place_ && row + kRowsOfBlock <= x_.rows)
      return {at(x_, row, 0), at(x_, row + kTileSide, 0), 2 * x_.stride, kTileDepth};
    pack_rows(x_, row, steps_, room);
    if (!mask_.keeps_all()) drop(row, room);
    return packed_block(room);
  }
  void drop(int64_t row, uint16_t* room) const {
    for (int64_t i = 0; i < std::min(kRowsOfBlock, x_.rows - row); ++i) {
      uint16_t* to = room + i / kTileSide * kTileElements + i % kTileSide * kTileDepth;
      for (int64_t step = 0; step < steps_; step += 2) {
        const uint64_t bits = mask_.span(row + i, step * kTileDepth);
        for (int64_t half = 0; half < std::min<int64_t>(2, steps_ - step); ++half) {
          uint16_t* own = to + (step + half) * kStepElements;
          _mm512_store_si512(own, load_kept(own, bits >> (32 * half)));
        }
      }
    }
  }

  const Matrix& x_;
  const KeepMask& mask_;
  int64_t steps_;
  bool in_place_;
};

// How the rows are shared out: chunks of blocks that stay in a second-level cache.
struct Chunks {
  int64_t blocks, each, count;

  Chunks(int64_t rows, int64_t elements_of_block, int threads) {
    blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
    const int64_t fit = std::max<int64_t>(1, kChunkBytes / (2 * elements_of_block));
    const int64_t rounds = (blocks + threads * fit - 1) / (threads * fit);
    each = (blocks + threads * rounds - 1) / (threads * rounds);
    count = (blocks + each - 1) / each;
  }
  int64_t of(int64_t chunk) const { return std::min(each, blocks - chunk * each); }
};

// A row of a packed block of 32 columns.
inline uint16_t* row_of_step(uint16_t* block, int64_t step, int64_t i) {
  return block + step * kStepElements + i / kTileSide * kTileElements + i % kTileSide * kTileDepth;
}

// Steps of 32 rows of a thin matrix as tiles of its transpose: [16 columns, 32 rows] each.
class Turned {
 public:
  Turned(int64_t rows, int64_t cols, uint16_t*& room)
      : steps_(steps_of(rows)), groups_(2 * steps_of(cols)), tiles_(room) {
    room += elements(rows, cols);
  }
  static int64_t elements(int64_t rows, int64_t cols) {
    return steps_of(rows) * 2 * steps_of(cols) * kTileElements;
  }
  int64_t groups() const { return groups_; }  // of 16 columns
  const uint16_t* tile(int64_t group, int64_t step) const {
    return tiles_ + (group * steps_ + step) * kTileElements;
  }
  // 32 columns from group `group` on, of [32, 32] values.
  void put(const float* values, int64_t group, int64_t step) {
    alignas(64) float turned[2][kTileSide * kLanes];
    for (int64_t half = 0; half < 2; ++half) {
      const float* own = values + half * kTileSide;
      transpose_16(own, kColumnsOfPanel, turned[0], kLanes);
      transpose_16(own + kTileSide * kColumnsOfPanel, kColumnsOfPanel, turned[1], kLanes);
      uint16_t* to = tiles_ + ((group + half) * steps_ + step) * kTileElements;
      for (int64_t r = 0; r < kTileSide; ++r)
        _mm512_store_si512(to + r * kTileDepth,
                           rounded(load(turned[0] + r * kLanes), load(turned[1] + r * kLanes)));
    }
  }
  // out [1, columns] = the sums over the rows.
  void sum(const MutableMatrix& out) const {
    with_element(out.dtype, [&](auto element) {
      using E = decltype(element);
      for (int64_t c = 0; c < out.cols; ++c) {
        __m512 sums = _mm512_setzero_ps();
        for (int64_t step = 0; step < steps_; ++step)
          sums = add_pairs(sums, tile(c / kTileSide, step) + c % kTileSide * kTileDepth);
        E::store_one(static_cast<typename E::type*>(out.data) + c, _mm512_reduce_add_ps(sums));
      }
    });
  }
  // Each lane of fp32 plus the pair of bf16 in it.
  static __m512 add_pairs(__m512 sums, const uint16_t* pairs) {
    const __m512i ones = _mm512_set1_epi16(0x3f80);
    return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_load_si512(pairs), (__m512bh)ones);
  }

 private:
  int64_t steps_, groups_;
  uint16_t* tiles_;
};

}  // namespace fasttune::cpu::FASTTUNE_ISA

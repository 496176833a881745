// The operands of a bottleneck adapter's products as tiles: its weights, rows of what is wide, and
// the transpose of what is thin. In bf16 they have one term, in fp32 three (terms.h).
#pragma once

#include "amx/terms.h"

namespace fasttune::cpu::FASTTUNE_ISA {

constexpr int64_t kChunkBytes = 512 << 10;  // of rows that share the panels of a weight
constexpr int64_t kMostBlocks = kChunkBytes / (2 * kStepElements);

inline int64_t steps_of(int64_t depth) { return (depth + kTileDepth - 1) / kTileDepth; }

// A weight of `cols` columns as panels [panel, step, term, 2 tiles]; it lies as [depth, cols] or,
// if transposed, as [cols, depth].
template <int Terms>
class Packed {
 public:
  Packed(const Matrix& w, bool transposed, uint16_t*& room)
      : w_(w),
        transposed_(transposed),
        steps_(steps_of(transposed ? w.cols : w.rows)),
        panels_(steps_of(transposed ? w.rows : w.cols)),
        tiles_(room) {
    room += items() * kTermsElements<Terms>;
  }
  static int64_t elements(const Matrix& w) {
    return steps_of(w.rows) * steps_of(w.cols) * kTermsElements<Terms>;
  }
  int64_t items() const { return panels_ * steps_; }
  int64_t steps() const { return steps_; }
  int64_t panels() const { return panels_; }
  const uint16_t* panel(int64_t i, int64_t step = 0) const {
    return tiles_ + (i * steps_ + step) * kTermsElements<Terms>;
  }
  void pack(int64_t item) {
    const int64_t col = item / steps_ * kColumnsOfPanel, k = item % steps_ * kTileDepth;
    uint16_t* to = tiles_ + item * kTermsElements<Terms>;
    if constexpr (Terms > 1) {
      if (transposed_) return pack_transposed_terms<Terms>(w_, col, k, to);
      pack_pairs_of_terms(w_, k, col, to);
    } else {
      if (!transposed_) return pack_pairs(w_, k, col, 1, to, 0);
      pack_transposed(w_, col, k, to);
      pack_transposed(w_, col + kTileSide, k, to + kTileElements);
    }
  }

 private:
  const Matrix& w_;
  bool transposed_;
  int64_t steps_, panels_;
  uint16_t* tiles_;
};

// Blocks of rows of a wide matrix. In bf16 they are read where they lie or packed: what dropout
// clears, rows beyond the end, and rows that would compete for the same lines of the caches. In
// fp32 they are packed as many steps at a time as one sum takes.
template <int Terms>
class Rows {
 public:
  Rows(const Matrix& x, const KeepMask& mask) : x_(x), mask_(mask), steps_(steps_of(x.cols)) {
    in_place_ =
        Terms == 1 && mask.keeps_all() && x.cols % kTileDepth == 0 && 2 * x.stride % 2048 != 0;
  }
  int64_t steps_of_sum() const {
    constexpr int64_t kMost = 12;
    const int64_t sums = Terms == 1 ? 1 : (steps_ + kMost - 1) / kMost;
    return (steps_ + sums - 1) / sums;
  }
  // Room for a block.
  int64_t elements() const { return steps_of_sum() * kTermsElements<Terms>; }
  Block block(int64_t row, uint16_t* room) const {
    if (in_place_ && row + kRowsOfBlock <= x_.rows)
      return {at(x_, row, 0), at(x_, row + kTileSide, 0), 2 * x_.stride, kTileDepth};
    if (mask_.keeps_all())
      pack_rows(x_, row, steps_, room);
    else
      pack_rows_of_terms<1>(x_, mask_, row, 0, steps_, room);
    return packed_block(room);
  }
  void pack(int64_t row, int64_t first, int64_t steps, uint16_t* room) const {
    pack_rows_of_terms<Terms>(x_, mask_, row, first, steps, room);
  }

 private:
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

// 32 values as row i of a step of a packed block, [step, term, 2 tiles].
template <int Terms>
inline void put_row(uint16_t* block, int64_t step, int64_t i, vf low, vf high) {
  uint16_t* to = block + step * kTermsElements<Terms> + i / kTileSide * kTileElements +
                 i % kTileSide * kTileDepth;
  const auto row = terms_of<Terms>(low, high);
  for (int term = 0; term < Terms; ++term)
    _mm512_store_si512(to + term * kStepElements, row.term[term]);
}

// Steps of 32 rows of a thin matrix as tiles of its transpose, [32 columns, step, term, 2 tiles of
// 16 columns and 32 rows].
template <int Terms>
class Turned {
 public:
  Turned(int64_t rows, int64_t cols, uint16_t*& room)
      : steps_(steps_of(rows)), groups_(steps_of(cols)), tiles_(room) {
    room += elements(rows, cols);
  }
  static int64_t elements(int64_t rows, int64_t cols) {
    return steps_of(rows) * steps_of(cols) * kTermsElements<Terms>;
  }
  int64_t groups() const { return groups_; }  // of 32 columns
  const uint16_t* tiles(int64_t group, int64_t step) const {
    return tiles_ + (group * steps_ + step) * kTermsElements<Terms>;
  }
  // The columns of a group, of [32, 32] values.
  void put(const float* values, int64_t group, int64_t step) {
    alignas(64) float turned[2][kTileSide * kLanes];
    uint16_t* to = tiles_ + (group * steps_ + step) * kTermsElements<Terms>;
    for (int64_t half = 0; half < 2; ++half) {
      const float* own = values + half * kTileSide;
      transpose_16(own, kColumnsOfPanel, turned[0], kLanes);
      transpose_16(own + kTileSide * kColumnsOfPanel, kColumnsOfPanel, turned[1], kLanes);
      for (int64_t r = 0; r < kTileSide; ++r)
        put_row<Terms>(to, 0, half * kTileSide + r, load(turned[0] + r * kLanes),
                       load(turned[1] + r * kLanes));
    }
  }
  // out [1, columns] = the sums over the rows.
  void sum(const MutableMatrix& out) const {
    with_element(out.dtype, [&](auto element) {
      using E = decltype(element);
      for (int64_t c = 0; c < out.cols; ++c) {
        __m512 sums = _mm512_setzero_ps();
        const int64_t own = c % kColumnsOfPanel;
        for (int64_t step = 0; step < steps_; ++step)
          for (int term = Terms - 1; term >= 0; --term)
            sums =
                add_pairs(sums, tiles(c / kColumnsOfPanel, step) + term * kStepElements +
                                    own / kTileSide * kTileElements + own % kTileSide * kTileDepth);
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

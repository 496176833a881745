// A bottleneck adapter in bf16 on tiles: one pass over the rows each way, and one over the columns
// for the gradients of the weights.
//
// Floor, forward: x and the residual read, y written, 2 M (2 K + H) bytes or less; backward 2 M
// (3 K + 2 H). 12 M K R operations at 16 cycles for each 16 x 16 x 32: below R = 64 or so memory
// binds. What is R wide stays in a thread's caches; weights are packed once for all threads.
#include "bottleneck.h"

#include "amx/long_sums.h"
#include "amx/packing.h"
#include "threads.h"

namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

constexpr int64_t kChunkBytes = 512 << 10;  // of rows that share the panels of a weight

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
  Block block(int64_t row, uint16_t* room) const {
    if (in_place_ && row + kRowsOfBlock <= x_.rows)
      return {at(x_, row, 0), at(x_, row + kTileSide, 0), 2 * x_.stride, kTileDepth};
    pack_rows(x_, row, steps_, room);
    if (!mask_.keeps_all()) drop(row, room);
    return packed_block(room);
  }

 private:
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

inline Lanes lanes_of(__m512i row) {
  return {upper_halves(_mm512_castsi512_si256(row)),
          upper_halves(_mm512_extracti64x4_epi64(row, 1))};
}

// A row of a packed block of 32 columns.
inline uint16_t* row_of_step(uint16_t* block, int64_t step, int64_t i) {
  return block + step * kStepElements + i / kTileSide * kTileElements + i % kTileSide * kTileDepth;
}

inline void multiply_into(const Block& block, const uint16_t* panel, int64_t steps,
                          float* results) {
  clear_results();
  multiply(block, panel, steps);
  store_results(results);
}

// z = results + bias of rows from `row` and columns from `col`, and act(z) as a step of h.
template <typename A>
void activate(const float* results, const float* bias, const MutableMatrix& z, int64_t row,
              int64_t col, uint16_t* h, int64_t step) {
  const int64_t left = z.cols - col, rows = std::min(kRowsOfBlock, z.rows - row);
  const __mmask16 first = lower_floats(left), second = lower_floats(left - kLanes);
  const Lanes added = bias ? load_row(bias + col, first, second) : Lanes{};
  for (int64_t i = 0; i < kRowsOfBlock; ++i) {
    const float* sums = results + i * kColumnsOfPanel;
    const __m512i own = rounded(load(sums) + added.low, load(sums + kLanes) + added.high);
    if (i < rows)
      _mm512_mask_storeu_epi16(static_cast<uint16_t*>(z.data) + (row + i) * z.stride + col,
                               lower_lanes(left), own);
    const Lanes value = lanes_of(own);
    _mm512_store_si512(row_of_step(h, step, i), rounded(A::value(value.low), A::value(value.high)));
  }
}

// The columns of y from `col` on that results are of: residual + keep * scale (results + bias).
template <typename A, typename R>
void widen(const float* results, const Matrix* residual, const float* bias, const float* scale,
           float factor, const KeepMask& mask, const MutableMatrix& y, int64_t row, int64_t col) {
  const int64_t rows = std::min(kRowsOfBlock, y.rows - row), left = y.cols - col;
  const __mmask16 first = lower_floats(left), second = lower_floats(left - kLanes);
  const Lanes added = bias ? load_row(bias + col, first, second) : Lanes{};
  Lanes scales = scale ? load_row(scale + col, first, second) : Lanes{splat(1.0f), splat(1.0f)};
  scales.low *= factor, scales.high *= factor;
  for (int64_t i = 0; i < rows; ++i) {
    const float* sums = results + i * kColumnsOfPanel;
    Lanes out{(load(sums) + added.low) * scales.low,
              (load(sums + kLanes) + added.high) * scales.high};
    if (!mask.keeps_all()) {
      const auto kept =
          static_cast<uint32_t>(mask.span(row + i, col / kMaskSpan * kMaskSpan) >> col % kMaskSpan);
      out.low = keep_lanes(out.low, kept), out.high = keep_lanes(out.high, kept >> kLanes);
    }
    if constexpr (!std::is_void_v<A>) {
      const A* from = static_cast<const A*>(residual->data) + (row + i) * residual->stride + col;
      const Lanes own = load_row(from, first, second);
      out.low += own.low, out.high += own.high;
    }
    store_row(static_cast<R*>(y.data) + (row + i) * y.stride + col, out, first, second);
  }
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

// dz = factor results act'(z) and h = act(z): dz as a step of a packed block, both transposed.
template <typename A>
void differentiate(const float* results, const Matrix& z, float factor, int64_t row, int64_t col,
                   uint16_t* dz, Turned& turned_dz, Turned* turned_h) {
  alignas(64) float slopes[kRowsOfBlock * kColumnsOfPanel], values[kRowsOfBlock * kColumnsOfPanel];
  const int64_t left = z.cols - col, rows = std::min(kRowsOfBlock, z.rows - row);
  const int64_t step = col / kColumnsOfPanel;
  for (int64_t i = 0; i < kRowsOfBlock; ++i) {
    float* slope = slopes + i * kColumnsOfPanel;
    float* value = values + i * kColumnsOfPanel;
    if (i >= rows) {  // whatever the products gave
      std::fill_n(slope, kColumnsOfPanel, 0.0f), std::fill_n(value, kColumnsOfPanel, 0.0f);
      continue;
    }
    const Lanes own = lanes_of(_mm512_maskz_loadu_epi16(lower_lanes(left), at(z, row + i, col)));
    const float* sums = results + i * kColumnsOfPanel;
    const Jet low = A::jet(own.low), high = A::jet(own.high);
    const vf first = load(sums) * factor * low.slope;
    const vf second = load(sums + kLanes) * factor * high.slope;
    store(slope, first), store(slope + kLanes, second);
    store(value, low.value), store(value + kLanes, high.value);
    _mm512_store_si512(row_of_step(dz, step, i), rounded(first, second));
  }
  turned_dz.put(slopes, 2 * step, row / kRowsOfBlock);
  if (turned_h) turned_h->put(values, 2 * step, row / kRowsOfBlock);
}

// sums [groups of 16, kMaskSpan] = (`more`: += ) thin tiles times staged halves of columns.
void multiply_outer(const Turned& thin, int64_t first_step, int64_t steps, const uint16_t* block,
                    bool more, float* sums) {
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
void store_sums(const __m512* sums, float factor, const MutableMatrix& out, int64_t col) {
  alignas(64) float all[kMaskSpan];
  for (int64_t i = 0; i < 4; ++i) store(all + i * kLanes, (vf)sums[i] * factor);
  with_element(out.dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t c = 0; c < std::min(kMaskSpan, out.cols - col); ++c)
      E::store_one(static_cast<typename E::type*>(out.data) + col + c, all[c]);
  });
}

// sums [cols of thin, 64] to rows of out [cols of thin, K].
void store_rows(const float* sums, const MutableMatrix& out, int64_t col) {
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
void store_columns(const float* sums, float factor, const MutableMatrix& out, int64_t row) {
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
void outer(const Matrix& wide, const Turned* thin, const KeepMask& mask, int64_t col, float* sums,
           __m512* column_sums) {
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

}  // namespace

void bottleneck_forward(const Bottleneck& adapter, const Matrix* residual, const Matrix* up_bias,
                        const Matrix* scale, const MutableMatrix& z, const MutableMatrix& y,
                        int threads) {
  if (adapter.x.dtype != DType::kBFloat16)
    return avx512::table().bottleneck_forward(adapter, residual, up_bias, scale, z, y, threads);
  const Vector down_bias(adapter.down_bias), added(up_bias), scales(scale);
  const KeepMask mask(adapter.dropout), keep_all(Dropout{});
  const Rows rows(adapter.x, keep_all);
  const Chunks chunks(y.rows, rows.elements(), threads);
  const int64_t thin = steps_of(z.cols) * kStepElements;
  const int64_t own = chunks.each * (rows.elements() + thin);
  const int team = static_cast<int>(std::min<int64_t>(threads, chunks.count));
  const TileScratch scratch(Packed::elements(adapter.down) + Packed::elements(adapter.up) +
                            team * own);
  uint16_t* room = scratch.data();
  Packed down(adapter.down, true, room), up(adapter.up, true, room);

  const auto run = [&](auto act, auto addend, auto result, int64_t chunk) {
    using A = typename decltype(addend)::type;
    using R = typename decltype(result)::type;
    alignas(64) float results[kRowsOfBlock * kColumnsOfPanel];
    uint16_t *packed = room + thread_index() * own, *h = packed + chunks.each * rows.elements();
    const int64_t first = chunk * chunks.each, count = chunks.of(chunk);
    Block blocks[kChunkBytes / (2 * kStepElements)];
    for (int64_t i = 0; i < count; ++i)
      blocks[i] = rows.block((first + i) * kRowsOfBlock, packed + i * rows.elements());
    for (int64_t p = 0; p < down.panels(); ++p)
      for (int64_t i = 0; i < count; ++i) {
        multiply_into(blocks[i], down.panel(p), down.steps(), results);
        activate<decltype(act)>(results, down_bias.data(), z, (first + i) * kRowsOfBlock,
                                p * kColumnsOfPanel, h + i * thin, p);
      }
    for (int64_t q = 0; q < up.panels(); ++q)
      for (int64_t i = 0; i < count; ++i) {
        multiply_into(packed_block(h + i * thin), up.panel(q), up.steps(), results);
        widen<A, R>(results, residual, added.data(), scales.data(), adapter.factor, mask, y,
                    (first + i) * kRowsOfBlock, q * kColumnsOfPanel);
      }
  };
  with_activation_or_none(adapter.activation, [&](auto act) {
    with_types(residual, y.dtype, [&](auto addend, auto result) {
#pragma omp parallel num_threads(team)
      {
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < down.items(); ++item) down.pack(item);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < up.items(); ++item) up.pack(item);
        [[maybe_unused]] const UseTiles use;
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks.count; ++chunk) run(act, addend, result, chunk);
        _mm_sfence();
      }
    });
  });
}

void bottleneck_backward(const Bottleneck& adapter, const Matrix& dy, const Matrix& z,
                         const Matrix* addend, float outer_factor,
                         const BottleneckGradients& gradients, int threads) {
  if (adapter.x.dtype != DType::kBFloat16)
    return avx512::table().bottleneck_backward(adapter, dy, z, addend, outer_factor, gradients,
                                               threads);
  Dropout dropout = adapter.dropout;
  std::vector<uint64_t> bits;  // drawn once for both reads of dy
  if (dropout.threshold != 0) {
    dropout.drawn_stride = (dy.cols + kMaskSpan - 1) / kMaskSpan;
    bits.resize(dy.rows * dropout.drawn_stride);
    avx512::table().draw(dropout, dy.rows, dy.cols, bits.data(), threads);
    dropout.drawn = bits.data();
  }
  const KeepMask mask(dropout), keep_all(Dropout{});
  const Rows rows(dy, mask);
  const Chunks chunks(dy.rows, rows.elements(), threads);
  const int64_t thin = steps_of(z.cols) * kStepElements;
  const int64_t own = chunks.each * (rows.elements() + thin);
  const bool inner = gradients.dx || gradients.down || gradients.down_bias || gradients.up;
  const int64_t spans_x = gradients.down ? (adapter.x.cols + kMaskSpan - 1) / kMaskSpan : 0;
  const int64_t spans_dy =
      gradients.up || gradients.up_bias ? (dy.cols + kMaskSpan - 1) / kMaskSpan : 0;
  const int team = static_cast<int>(
      std::min<int64_t>(threads, std::max(inner ? chunks.count : 1, spans_x + spans_dy)));
  const TileScratch scratch(Packed::elements(adapter.down) + Packed::elements(adapter.up) +
                            2 * Turned::elements(z.rows, z.cols) + team * own);
  uint16_t* room = scratch.data();
  Packed up(adapter.up, false, room), down(adapter.down, false, room);
  Turned dz(z.rows, z.cols, room), h(z.rows, z.cols, room);
  const MutableMatrix none{};
  const MutableMatrix& dx = gradients.dx ? *gradients.dx : none;

  const auto run = [&](auto act, auto added, auto result, int64_t chunk) {
    using A = typename decltype(added)::type;
    using R = typename decltype(result)::type;
    alignas(64) float results[kRowsOfBlock * kColumnsOfPanel];
    uint16_t *packed = room + thread_index() * own,
             *thin_rows = packed + chunks.each * rows.elements();
    const int64_t first = chunk * chunks.each, count = chunks.of(chunk);
    Block blocks[kChunkBytes / (2 * kStepElements)];
    for (int64_t i = 0; i < count; ++i)
      blocks[i] = rows.block((first + i) * kRowsOfBlock, packed + i * rows.elements());
    for (int64_t p = 0; p < up.panels(); ++p)
      for (int64_t i = 0; i < count; ++i) {
        multiply_into(blocks[i], up.panel(p), up.steps(), results);
        differentiate<decltype(act)>(results, z, adapter.factor, (first + i) * kRowsOfBlock,
                                     p * kColumnsOfPanel, thin_rows + i * thin, dz,
                                     gradients.up ? &h : nullptr);
      }
    if (!gradients.dx) return;
    for (int64_t q = 0; q < down.panels(); ++q)
      for (int64_t i = 0; i < count; ++i) {
        multiply_into(packed_block(thin_rows + i * thin), down.panel(q), down.steps(), results);
        widen<A, R>(results, addend, nullptr, nullptr, 1.0f, keep_all, dx,
                    (first + i) * kRowsOfBlock, q * kColumnsOfPanel);
      }
  };
  const auto span = [&](int64_t index) {
    alignas(64) float sums[kMaxRank * kMaskSpan];
    if (index < spans_x) {
      outer(adapter.x, &dz, keep_all, index * kMaskSpan, sums, nullptr);
      return store_rows(sums, *gradients.down, index * kMaskSpan);
    }
    const int64_t col = (index - spans_x) * kMaskSpan;
    __m512 columns[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                         _mm512_setzero_ps()};
    outer(dy, gradients.up ? &h : nullptr, mask, col, sums, gradients.up_bias ? columns : nullptr);
    if (gradients.up) store_columns(sums, outer_factor, *gradients.up, col);
    if (gradients.up_bias) store_sums(columns, outer_factor, *gradients.up_bias, col);
  };
  with_activation_or_none(adapter.activation, [&](auto act) {
    with_types(addend, dx.dtype, [&](auto added, auto result) {
#pragma omp parallel num_threads(team)
      {
        if (inner) {
#pragma omp for schedule(static) nowait
          for (int64_t item = 0; item < up.items(); ++item) up.pack(item);
#pragma omp for schedule(static)
          for (int64_t item = 0; item < down.items(); ++item) down.pack(item);
        }
        [[maybe_unused]] const UseTiles use;
        if (inner) {
#pragma omp for schedule(static)
          for (int64_t chunk = 0; chunk < chunks.count; ++chunk) run(act, added, result, chunk);
        }
        _mm_sfence();
        if (gradients.down_bias) {
#pragma omp single nowait
          dz.sum(*gradients.down_bias);
        }
#pragma omp for schedule(dynamic)
        for (int64_t index = 0; index < spans_x + spans_dy; ++index) span(index);
      }
    });
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

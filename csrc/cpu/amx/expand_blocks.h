// What the products on tiles share whose results are rounded and stored: a block of 32 rows times a
// panel of 32 columns, both packed as tiles, and what is added to it.
//
// A packed block is [step, 2 tiles of 16 rows], a packed panel [step, 2 interleaved tiles of 16
// columns]; a step is one product of depth kTileDepth.
#pragma once

#include "amx/lora_blocks.h"

namespace fasttune::cpu::FASTTUNE_ISA {

constexpr int64_t kColumnsOfPanel = 2 * kTileSide;
constexpr int64_t kStepElements = 2 * kTileElements;
constexpr int64_t kStepsOfRanks = 3;  // that 16 ranks of LoRA take

// 32 rows as tiles: 16 rows each, `stride` bytes apart, the next step's `step` elements further.
struct Block {
  const uint16_t *upper, *lower;
  int64_t stride, step;
};
inline Block packed_block(const uint16_t* tiles) {
  return {tiles, tiles + kTileElements, kTileRowBytes, kStepElements};
}

// Asks for half of a tile's rows.
inline void prefetch_half(const uint16_t* tile, int64_t stride, int half) {
  const char* rows = reinterpret_cast<const char*>(tile) + half * kTileSide / 2 * stride;
  for (int64_t i = 0; i < kTileSide / 2; ++i) _mm_prefetch(rows + i * stride, _MM_HINT_T0);
}

// What comes after a product, asked for on its way: at each of its steps a line of the caches of
// each of `rows`, at the next step the next line.
struct Ahead {
  const uint16_t* data;
  int64_t stride, rows;

  void ask() {
    for (int64_t i = 0; i < rows; ++i) _mm_prefetch(data + i * stride, _MM_HINT_T1);
    if (rows > 0) data += kTileDepth;  // nothing is added to a null pointer
  }
};

// Registers 0 to 3 += a block times a packed panel. Each register is loaded again as early as its
// last reader allows, and lines are asked for two steps ahead, an eighth of a step's before each
// instruction on tiles: where two threads share a core, instructions on tiles that follow one
// another directly wait for each other (a step takes 101 ns with a quarter of the lines before
// every second one, 122 without, 77 so, 67 without any loads).
inline void multiply(const Block& block, const uint16_t* panel, int64_t steps, Ahead ahead = {}) {
  constexpr int64_t kAhead = 2;
  const uint16_t *upper = block.upper, *lower = block.lower;
  const int64_t stride = block.stride, step = block.step;
  if (steps == 0) return;
  tile_load<6>(panel, kTileRowBytes), tile_load<4>(upper, stride), tile_load<5>(lower, stride);
  for (; steps > 1; --steps) {
    ahead.ask();
    const uint16_t *left = panel + kAhead * kStepElements, *right = left + kTileElements;
    prefetch_half(upper + kAhead * step, stride, 0);
    tile_dot<0, 4, 6>();
    prefetch_half(upper + kAhead * step, stride, 1);
    tile_dot<2, 5, 6>();
    prefetch_half(lower + kAhead * step, stride, 0);
    tile_load<7>(panel + kTileElements, kTileRowBytes);
    prefetch_half(lower + kAhead * step, stride, 1);
    tile_load<6>(panel + kStepElements, kTileRowBytes);
    prefetch_half(left, kTileRowBytes, 0);
    tile_dot<1, 4, 7>();
    prefetch_half(left, kTileRowBytes, 1);
    tile_load<4>(upper + step, stride);
    prefetch_half(right, kTileRowBytes, 0);
    tile_dot<3, 5, 7>();
    prefetch_half(right, kTileRowBytes, 1);
    tile_load<5>(lower + step, stride);
    panel += kStepElements, upper += step, lower += step;
  }
  tile_dot<0, 4, 6>(), tile_dot<2, 5, 6>();
  tile_load<7>(panel + kTileElements, kTileRowBytes);
  tile_dot<1, 4, 7>(), tile_dot<3, 5, 7>();
}

inline void clear_results() { tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>(); }

// results [kRowsOfBlock, kColumnsOfPanel] = registers 0 to 3.
inline void store_results(float* results) {
  constexpr int64_t kRowBytes = kColumnsOfPanel * sizeof(float);
  float* below = results + kTileSide * kColumnsOfPanel;
  tile_store<0>(results, kRowBytes), tile_store<1>(results + kLanes, kRowBytes);
  tile_store<2>(below, kRowBytes), tile_store<3>(below + kLanes, kRowBytes);
}

// The steps of 32 rows of t, [16 ranks, 3]: [t1 t1], [t2 t2], [t1 t3] of its terms.
inline void split_left(const float* t, int64_t rank, int64_t rows, uint16_t* block) {
  constexpr int kLeft[3] = {0, 1, 0}, kRight[3] = {0, 1, 2};
  for (int64_t first = 0; first < rank; first += kLanes) {
    const __mmask16 valid = lower_floats(rank - first);
    for (int64_t i = 0; i < kRowsOfBlock; ++i) {
      const Terms terms =
          split(i < rows ? (vf)_mm512_maskz_loadu_ps(valid, t + i * rank + first) : vf{});
      __m256i part[3];
      for (int term = 0; term < 3; ++term)
        part[term] = _mm512_cvtepi32_epi16((__m512i)(terms.part[term] >> 16));
      uint16_t* tile = block + i / kTileSide * kTileElements + i % kTileSide * kTileDepth;
      for (int step = 0; step < kStepsOfRanks; ++step, tile += kStepElements) {
        auto* row = reinterpret_cast<__m256i*>(tile);
        _mm256_store_si256(row, part[kLeft[step]]);
        _mm256_store_si256(row + 1, part[kRight[step]]);
      }
    }
    block += kStepsOfRanks * kStepElements;
  }
}

// The steps of 32 columns of the factor [rank, cols] from `col`, [16 ranks, 3]: [p1; p2], [p1; p2]
// and [p3; p1]. With split_left, that gives all products of terms down to 2^-16 of the first.
inline void split_right(const float* factor, int64_t rank, int64_t cols, int64_t col,
                        uint16_t* panel) {
  for (int64_t first = 0; first < rank; first += kLanes, panel += kStepsOfRanks * kStepElements)
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t c = col + half * kTileSide;
      const __mmask16 valid = lower_floats(cols - c);
      const auto ranks = [&](int64_t r) {
        return split(r < rank && valid ? (vf)_mm512_maskz_loadu_ps(valid, factor + r * cols + c)
                                       : vf{});
      };
      for (int64_t p = 0; p < kTileSide / 2; ++p) {
        const Terms a = ranks(first + 2 * p), b = ranks(first + 2 * p + 1);
        uint16_t* tile = panel + half * kTileElements + p * kTileDepth;
        const auto put = [&](int step, int part, int term) {
          store_pairs(tile + step * kStepElements + part * kTileElements / 2,
                      pair(a.part[term], b.part[term]));
        };
        put(0, 0, 0), put(0, 1, 1), put(1, 0, 0), put(1, 1, 1), put(2, 0, 2), put(2, 1, 0);
      }
    }
}

inline vf upper_halves(__m256i v) { return as_float((vu)_mm512_cvtepu16_epi32(v) << 16); }

struct Lanes {
  vf low, high;
};

// 32 values of a row, fp32 or bf16, of which those exist that the masks say.
template <typename T>
inline Lanes load_row(const T* from, __mmask16 first, __mmask16 second) {
  if constexpr (sizeof(T) == sizeof(float))
    return {(vf)_mm512_maskz_loadu_ps(first, from),
            (vf)_mm512_maskz_loadu_ps(second, from + kLanes)};
  else
    return {upper_halves(_mm256_maskz_loadu_epi16(first, from)),
            upper_halves(_mm256_maskz_loadu_epi16(second, from + kLanes))};
}
// Whole lines go around the caches, which would have to read them first, unless they are read again
// soon; who stores so ends with a fence.
template <bool Again = false, typename T>
inline void store_row(T* to, const Lanes& row, __mmask16 first, __mmask16 second) {
  const bool whole = !Again && second == 0xffff && reinterpret_cast<uintptr_t>(to) % 64 == 0;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (whole) {
      _mm512_stream_ps(to, (__m512)row.low);
      _mm512_stream_ps(to + kLanes, (__m512)row.high);
    } else {
      _mm512_mask_storeu_ps(to, first, (__m512)row.low);
      _mm512_mask_storeu_ps(to + kLanes, second, (__m512)row.high);
    }
  } else {
    const __m512i lanes = rounded(row.low, row.high);
    if (whole)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), lanes);
    else
      _mm512_mask_storeu_epi16(to, first | static_cast<__mmask32>(second) << kLanes, lanes);
  }
}

// Scales rows of a panel of a product in place, after leaving them as they are where they are kept.
inline void scale_product(const ScaledProduct& product, int64_t rows, int64_t cols, float* results,
                          int64_t row, int64_t col) {
  const __mmask16 first = lower_floats(cols - col), second = lower_floats(cols - col - kLanes);
  const Lanes scale = load_row(product.scale + col, first, second);
  const MutableMatrix* out = product.out;
  for (int64_t i = 0; i < rows; ++i, results += kColumnsOfPanel) {
    const Lanes y{load(results), load(results + kLanes)};
    const int64_t at = out ? (row + i) * out->stride + col : 0;
    if (out && out->dtype == DType::kFloat32)
      store_row(static_cast<float*>(out->data) + at, y, first, second);
    else if (out)
      store_row(static_cast<uint16_t*>(out->data) + at, y, first, second);
    store(results, y.low * scale.low), store(results + kLanes, y.high * scale.high);
  }
}

// Writes rows of a panel: results, what dropout keeps of `dropped` (one may be null), addend and
// bias, rounded.
// bits(i) are the keep bits of row i, A and R the elements of the addend (void: none) and of the
// output.
template <typename A, typename R, typename Bits>
inline void finish(const float* results, const float* dropped, Bits&& bits,
                   const ExpandTerms& terms, const MutableMatrix& out, int64_t row, int64_t col) {
  const int64_t rows = std::min(kRowsOfBlock, out.rows - row), left = out.cols - col;
  const __mmask16 first = lower_floats(left), second = lower_floats(left - kLanes);
  const auto at = [&](const float* vector) { return load_row(vector + col, first, second); };
  const Lanes none{}, bias = terms.bias ? at(terms.bias) : none;
  const Lanes scale = terms.addend_scale ? at(terms.addend_scale) : none;
  for (int64_t i = 0; i < rows; ++i) {
    Lanes y{};
    if (results) {
      const float* sums = results + i * kColumnsOfPanel;
      y = {load(sums), load(sums + kLanes)};
    }
    if (dropped) {
      const float* drop = dropped + i * kColumnsOfPanel;
      const uint32_t kept = bits(i);
      y.low += keep_lanes(load(drop), kept);
      y.high += keep_lanes(load(drop + kLanes), kept >> kLanes);
    }
    if constexpr (!std::is_void_v<A>) {
      const Matrix& x = *terms.addend;
      Lanes added =
          load_row(static_cast<const A*>(x.data) + (row + i) * x.stride + col, first, second);
      if (terms.addend_scale) added.low *= scale.low, added.high *= scale.high;
      y.low += added.low, y.high += added.high;
    }
    y.low += bias.low, y.high += bias.high;
    store_row(static_cast<R*>(out.data) + (row + i) * out.stride + col, y, first, second);
  }
}

template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<A>{}, Type<R>{}) with the elements of an addend (null: void) and of the output.
template <typename Body>
void with_types(const Matrix* addend, DType out, Body&& body) {
  const auto for_output = [&](auto result) {
    if (!addend) return body(Type<void>{}, result);
    if (addend->dtype == DType::kFloat32) return body(Type<float>{}, result);
    body(Type<uint16_t>{}, result);
  };
  if (out == DType::kFloat32) return for_output(Type<float>{});
  for_output(Type<uint16_t>{});
}

// Calls body with finish for the dtypes at hand, as a generic lambda of its arguments.
template <typename Body>
void with_finish(const Matrix* addend, DType out, Body&& body) {
  with_types(addend, out, [&](auto addend, auto result) {
    using A = typename decltype(addend)::type;
    using R = typename decltype(result)::type;
    body([](auto&&... args) { finish<A, R>(static_cast<decltype(args)&&>(args)...); });
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

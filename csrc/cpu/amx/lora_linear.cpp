// LoRA's products for activations in bf16, on tiles. The fp32 factors go in as three bf16 terms
// each, which is exact, so that the sums are as close to the truth as sums of fp32 products.
//
// Floor: 16 cycles a product of 16 x 16 x 32, and three of them for 32 rows of a factor: a
// fifteenth of the cycles of fp32 multiply-adds. What is left is to read x and to draw its mask.
#include "amx/lora_linear.h"

#include "amx/tiles.h"
#include "keep_mask.h"
#include "transpose.h"

namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

constexpr int64_t kFewestRows = 32;  // below, splitting the factors costs more than it saves
constexpr int64_t kBlockRows = 32;   // rows of x that share the operands of a product
constexpr int64_t kSumSteps = 8;  // products that one accumulator takes: 256 values of k. One sum
                                  // over all would be several times less exact
constexpr int64_t kSumDepth = kSumSteps * kTileDepth;
constexpr int64_t kMostGroups = kMaxRank / kLanes;

inline int team(int threads, int64_t items) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, items)));
}

inline bool on_tiles(DType dtype, int64_t rows, int64_t cols) {
  return dtype == DType::kBFloat16 && rows >= kFewestRows && cols > 0;
}

// The first `count` of 16 lanes.
inline __mmask16 lanes_left(int64_t count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}
inline __mmask32 lanes_of_pair(__mmask16 first, __mmask16 second) {
  return first | static_cast<__mmask32>(second) << kLanes;
}

const uint16_t* row_of(const Matrix& x, int64_t row) {
  return static_cast<const uint16_t*>(x.data) + row * x.stride;
}

// Which of the span's columns exist and are kept.
inline uint64_t kept(const Matrix& x, const KeepMask& mask, int64_t row, int64_t col) {
  const int64_t valid = x.cols - col;
  if (row >= x.rows || valid <= 0) return 0;
  const uint64_t inside = valid >= kMaskSpan ? ~uint64_t{0} : (uint64_t{1} << valid) - 1;
  return mask.span(row, col) & inside;
}

inline __m512i load_kept(const uint16_t* p, uint64_t bits) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(bits), p);
}

// [rows of a block, kSumDepth] of x, with dropout and zeros beyond the matrix.
void stage_rows(const Matrix& x, const KeepMask& mask, int64_t row, int64_t col, uint16_t* block) {
  const int64_t width = std::min(kSumDepth, (x.cols - col + kMaskSpan - 1) / kMaskSpan * kMaskSpan);
  for (int64_t i = 0; i < kBlockRows; ++i)
    for (int64_t span = 0; span < width; span += kMaskSpan) {
      const uint64_t bits = kept(x, mask, row + i, col + span);
      uint16_t* to = block + i * kSumDepth + span;
      const uint16_t* from = bits ? row_of(x, row + i) + col + span : to;
      _mm512_store_si512(to, load_kept(from, bits));
      _mm512_store_si512(to + kTileDepth, load_kept(from + kTileDepth, bits >> 32));
    }
}

// sums[i * step + 0:16] += the tile in `from` plus the one in `rest`, 16 rows each.
inline void add_tiles(const float* from, const float* rest, float* sums, int64_t step) {
  for (int64_t i = 0; i < kTileSide; ++i) {
    float* place = sums + i * step;
    store(place, load(place) + (load(from + i * kLanes) + load(rest + i * kLanes)));
  }
}

// Three interleaved tiles of terms of 32 rows of a panel [depth, padded], 16 columns from `first`.
void split_panel(const float* panel, int64_t depth, int64_t padded, int64_t k, int64_t first,
                 uint16_t* tiles) {
  for (int64_t p = 0; p < kTileSide; ++p) {
    const int64_t row = k + 2 * p;
    const Terms a = split(row < depth ? load(panel + row * padded + first) : vf{});
    const Terms b = split(row + 1 < depth ? load(panel + (row + 1) * padded + first) : vf{});
    for (int term = 0; term < 3; ++term)
      store_pairs(tiles + term * kTileElements + p * kTileDepth, pair(a.part[term], b.part[term]));
  }
}

// The block's rows times the tiles of terms [group, step, 3], into sums [kBlockRows, padded].
void reduce_block(const uint16_t* rows, int64_t stride_bytes, const uint16_t* tiles, int64_t steps,
                  int64_t all_steps, int64_t groups, float* sums) {
  alignas(64) float results[4][kTileSide * kLanes];
  const char* lower = reinterpret_cast<const char*>(rows) + kTileSide * stride_bytes;
  for (int64_t group = 0; group < groups; ++group) {
    const uint16_t* term = tiles + group * all_steps * 3 * kTileElements;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t step = 0; step < steps; ++step, term += 3 * kTileElements) {
      tile_load<4>(rows + step * kTileDepth, stride_bytes);
      tile_load<5>(lower + step * kTileRowBytes, stride_bytes);
      tile_load<6>(term, kTileRowBytes);
      tile_dot<0, 4, 6>(), tile_dot<1, 5, 6>();
      tile_load<7>(term + kTileElements, kTileRowBytes);
      tile_dot<2, 4, 7>(), tile_dot<3, 5, 7>();
      tile_load<6>(term + 2 * kTileElements, kTileRowBytes);
      tile_dot<2, 4, 6>(), tile_dot<3, 5, 6>();
    }
    tile_store<0>(results[0], kTileRowBytes), tile_store<1>(results[1], kTileRowBytes);
    tile_store<2>(results[2], kTileRowBytes), tile_store<3>(results[3], kTileRowBytes);
    float* sum = sums + group * kLanes;
    const int64_t padded = groups * kLanes;
    add_tiles(results[0], results[2], sum, padded);
    add_tiles(results[1], results[3], sum + kTileSide * padded, padded);
  }
}

void reduce_rows(const Matrix& x, const uint16_t* tiles, int64_t rank, float scale,
                 const KeepMask& mask, float* out, int64_t row) {
  const int64_t padded = padded_rank(rank), groups = padded / kLanes;
  const int64_t all_steps = (x.cols + kTileDepth - 1) / kTileDepth;
  const int64_t rows = std::min(kBlockRows, x.rows - row);
  alignas(64) uint16_t block[kBlockRows * kSumDepth];
  alignas(64) float sums[kBlockRows * kMaxRank];
  std::fill_n(sums, kBlockRows * padded, 0.0f);
  for (int64_t step = 0; step < all_steps; step += kSumSteps) {
    const int64_t steps = std::min(kSumSteps, all_steps - step), col = step * kTileDepth;
    const bool whole = rows == kBlockRows && col + steps * kTileDepth <= x.cols;
    if (!whole || !mask.keeps_all()) stage_rows(x, mask, row, col, block);
    const bool direct = whole && mask.keeps_all();
    reduce_block(direct ? row_of(x, row) + col : block, 2 * (direct ? x.stride : kSumDepth),
                 tiles + step * 3 * kTileElements, steps, all_steps, groups, sums);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t r = 0; r < rank; ++r) out[(row + i) * rank + r] = scale * sums[i * padded + r];
}

// Tiles of the terms of t^T, [16 ranks, 32 rows], of 32 rows of t [rows, padded] from (row, first).
void split_transposed(const float* t, int64_t rows, int64_t padded, int64_t row, int64_t first,
                      uint16_t* tiles) {
  alignas(64) float pairs[3][kTileSide * kLanes];
  for (int64_t p = 0; p < kTileSide; ++p) {
    const int64_t m = row + 2 * p;
    const Terms a = split(m < rows ? load(t + m * padded + first) : vf{});
    const Terms b = split(m + 1 < rows ? load(t + (m + 1) * padded + first) : vf{});
    for (int term = 0; term < 3; ++term)
      store(pairs[term] + p * kLanes, as_float(pair(a.part[term], b.part[term])));
  }
  for (int term = 0; term < 3; ++term)
    transpose_16(pairs[term], kLanes, reinterpret_cast<float*>(tiles + term * kTileElements),
                 kLanes);
}

// Interleaved tiles [step, 4, 16 pairs of rows, 16 columns, 2] of a span of x, kSumDepth rows.
void stage_columns(const Matrix& x, const KeepMask& mask, int64_t row, int64_t steps, int64_t col,
                   uint16_t* block) {
  for (int64_t p = 0; p < steps * kTileSide; ++p) {
    const int64_t m = row + 2 * p;
    const uint64_t first = kept(x, mask, m, col), second = kept(x, mask, m + 1, col);
    uint16_t* to = block + p / kTileSide * 4 * kTileElements + p % kTileSide * kTileDepth;
    const uint16_t* a = first ? row_of(x, m) + col : to;
    const uint16_t* b = second ? row_of(x, m + 1) + col : to;
    for (int half = 0; half < 2; ++half) {
      const __m512i va = load_kept(a + half * kTileDepth, first >> (32 * half));
      const __m512i vb = load_kept(b + half * kTileDepth, second >> (32 * half));
      uint16_t* target = to + 2 * half * kTileElements;
      const Interleaved both = interleave_lanes(va, vb);
      _mm512_store_si512(target, both.lower);
      _mm512_store_si512(target + kTileElements, both.upper);
    }
  }
}

// sums [16 ranks, kMaskSpan] += terms of t^T [step, 3] times the staged columns.
void outer_block(const uint16_t* terms, const uint16_t* block, int64_t steps, float* sums) {
  alignas(64) float results[4][kTileSide * kLanes];
  for (int64_t two = 0; two < 4; two += 2) {
    const uint16_t *term = terms, *columns = block + two * kTileElements;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t step = 0; step < steps; ++step) {
      tile_load<4>(columns, kTileRowBytes);
      tile_load<5>(columns + kTileElements, kTileRowBytes);
      tile_load<6>(term, kTileRowBytes);
      tile_dot<0, 6, 4>(), tile_dot<1, 6, 5>();
      tile_load<7>(term + kTileElements, kTileRowBytes);
      tile_dot<2, 7, 4>(), tile_dot<3, 7, 5>();
      tile_load<6>(term + 2 * kTileElements, kTileRowBytes);
      tile_dot<2, 6, 4>(), tile_dot<3, 6, 5>();
      term += 3 * kTileElements;
      columns += 4 * kTileElements;
    }
    tile_store<0>(results[0], kTileRowBytes), tile_store<1>(results[1], kTileRowBytes);
    tile_store<2>(results[2], kTileRowBytes), tile_store<3>(results[3], kTileRowBytes);
    add_tiles(results[0], results[2], sums + two * kLanes, kMaskSpan);
    add_tiles(results[1], results[3], sums + (two + 1) * kLanes, kMaskSpan);
  }
}

// sums [padded, kMaskSpan] of one span of columns.
void outer_columns(const Matrix& x, const uint16_t* tiles, int64_t groups, const KeepMask& mask,
                   int64_t col, float* sums) {
  alignas(64) uint16_t block[kSumSteps * 4 * kTileElements];
  const int64_t all_steps = (x.rows + kTileDepth - 1) / kTileDepth;
  std::fill_n(sums, groups * kLanes * kMaskSpan, 0.0f);
  for (int64_t step = 0; step < all_steps; step += kSumSteps) {
    const int64_t steps = std::min(kSumSteps, all_steps - step);
    stage_columns(x, mask, step * kTileDepth, steps, col, block);
    for (int64_t group = 0; group < groups; ++group)
      outer_block(tiles + (group * all_steps + step) * 3 * kTileElements, block, steps,
                  sums + group * kLanes * kMaskSpan);
  }
}

// Tiles of rows of t for each group of ranks: [t1 t1], [t2 t2], [t1 t3], 16 ranks each.
void split_left(const float* t, int64_t rank, int64_t rows, uint16_t* tiles) {
  constexpr int kLeft[3] = {0, 1, 0}, kRight[3] = {0, 1, 2};
  for (int64_t first = 0; first < rank; first += kLanes) {
    const __mmask16 valid = lanes_left(rank - first);
    for (int64_t i = 0; i < kBlockRows; ++i) {
      const Terms terms =
          split(i < rows ? (vf)_mm512_maskz_loadu_ps(valid, t + i * rank + first) : vf{});
      __m256i part[3];
      for (int term = 0; term < 3; ++term)
        part[term] = _mm512_cvtepi32_epi16((__m512i)(terms.part[term] >> 16));
      uint16_t* tile = tiles + (first / kLanes * 2 + i / kTileSide) * 3 * kTileElements;
      for (int step = 0; step < 3; ++step, tile += kTileElements) {
        auto* row = reinterpret_cast<__m256i*>(tile + i % kTileSide * kTileDepth);
        _mm256_store_si256(row, part[kLeft[step]]);
        _mm256_store_si256(row + 1, part[kRight[step]]);
      }
    }
  }
}

// Interleaved tiles of 16 ranks of a panel [rank, cols] and 16 columns: [p1; p2] and [p3; p1]. With
// split_left, that gives all products of terms down to 2^-16 of the first.
void split_right(const float* panel, int64_t rank, int64_t cols, int64_t first, int64_t col,
                 uint16_t* tiles) {
  const __mmask16 valid = lanes_left(cols - col);
  const auto ranks = [&](int64_t r) {
    return split(r < rank ? (vf)_mm512_maskz_loadu_ps(valid, panel + r * cols + col) : vf{});
  };
  for (int64_t p = 0; p < kTileSide / 2; ++p) {
    const Terms a = ranks(first + 2 * p), b = ranks(first + 2 * p + 1);
    const auto put = [&](int tile, int half, int term) {
      store_pairs(tiles + tile * kTileElements + (half * kTileSide / 2 + p) * kTileDepth,
                  pair(a.part[term], b.part[term]));
    };
    put(0, 0, 0), put(0, 1, 1), put(1, 0, 2), put(1, 1, 0);
  }
}

// results [kBlockRows, 2 kLanes] of two tiles of columns, from `tiles` [2, group, 2].
void expand_tiles(const uint16_t* left, const uint16_t* tiles, int64_t groups, float* results) {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t group = 0; group < groups; ++group) {
    const uint16_t* upper = left + group * 6 * kTileElements;
    const uint16_t *lower = upper + 3 * kTileElements, *b0 = tiles + group * 2 * kTileElements,
                   *b1 = b0 + groups * 2 * kTileElements;
    const auto step = [&](int64_t term) {
      tile_load<4>(upper + term * kTileElements, kTileRowBytes);
      tile_load<5>(lower + term * kTileElements, kTileRowBytes);
      tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>(), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
    };
    const auto right = [&](int64_t tile) {
      tile_load<6>(b0 + tile * kTileElements, kTileRowBytes);
      tile_load<7>(b1 + tile * kTileElements, kTileRowBytes);
    };
    right(1), step(2);  // small terms first
    right(0), step(1), step(0);
  }
  tile_store<0>(results, 2 * kTileRowBytes), tile_store<1>(results + kLanes, 2 * kTileRowBytes);
  float* below = results + 2 * kTileSide * kLanes;
  tile_store<2>(below, 2 * kTileRowBytes), tile_store<3>(below + kLanes, 2 * kTileRowBytes);
}

inline vf upper_halves(__m256i v) { return as_float((vu)_mm512_cvtepu16_epi32(v) << 16); }

// Rounded to nearest even; what is below 2^-126 is zero.
inline __m512i rounded(vf low, vf high) {
#if defined(__AVX512BF16__)
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  alignas(64) uint16_t lanes[2 * kLanes];
  Element<DType::kBFloat16>::store(lanes, low);
  Element<DType::kBFloat16>::store(lanes + kLanes, high);
  return _mm512_load_si512(lanes);
#endif
}

// One row of what expand_tiles left: what stays of it, what is added, its rounding.
template <typename Addend>
inline void finish(const float* results, uint64_t bits, const Addend& addend, const float* bias,
                   int64_t left, uint16_t* out) {
  const __mmask16 first = lanes_left(left), second = lanes_left(left - kLanes);
  vf low = keep_lanes(load(results), static_cast<uint32_t>(bits));
  vf high = keep_lanes(load(results + kLanes), static_cast<uint32_t>(bits >> kLanes));
  addend(low, high, first, second);
  if (bias) {
    low += (vf)_mm512_maskz_loadu_ps(first, bias);
    high += (vf)_mm512_maskz_loadu_ps(second, bias + kLanes);
  }
  const __m512i lanes = rounded(low, high);
  if (left >= 2 * kLanes)
    _mm512_storeu_si512(out, lanes);
  else
    _mm512_mask_storeu_epi16(out, lanes_of_pair(first, second), lanes);
}

// make_addend(row, col) gives what finish adds.
template <typename MakeAddend>
void expand_rows(const uint16_t* tiles, const float* t, int64_t rank, const ExpandTerms& terms,
                 const KeepMask& mask, const MutableMatrix& out, int64_t row,
                 MakeAddend&& make_addend) {
  const int64_t groups = padded_rank(rank) / kLanes, rows = std::min(kBlockRows, out.rows - row);
  alignas(64) uint16_t left[kMostGroups * 6 * kTileElements];
  alignas(64) float results[kBlockRows * 2 * kLanes];
  split_left(t + row * rank, rank, rows, left);
  for (int64_t span = 0; span < out.cols; span += kMaskSpan) {
    uint64_t bits[kBlockRows];
    for (int64_t i = 0; i < rows; ++i) bits[i] = mask.span(row + i, span);
    const int64_t end = std::min(out.cols, span + kMaskSpan);
    for (int64_t col = span; col < end; col += 2 * kLanes) {
      expand_tiles(left, tiles + col / kLanes * groups * 2 * kTileElements, groups, results);
      auto* to = static_cast<uint16_t*>(out.data) + row * out.stride + col;
      for (int64_t i = 0; i < rows; ++i)
        finish(results + i * 2 * kLanes, bits[i] >> (col - span), make_addend(row + i, col),
               terms.bias ? terms.bias + col : nullptr, out.cols - col, to + i * out.stride);
    }
  }
}

// Calls body with what makes the addend of a row, for each kind that there is.
template <typename Body>
void with_addend(const ExpandTerms& terms, Body&& body) {
  if (!terms.addend)
    return body([](int64_t, int64_t) { return [](vf&, vf&, __mmask16, __mmask16) {}; });
  const Matrix& x = *terms.addend;
  const float* scales = terms.addend_scale;
  const auto scaled = [=](vf value, __mmask16 valid, int64_t col) {
    return scales ? value * (vf)_mm512_maskz_loadu_ps(valid, scales + col) : value;
  };
  if (x.dtype == DType::kFloat32)
    return body([=, &x](int64_t row, int64_t col) {
      const float* from = static_cast<const float*>(x.data) + row * x.stride + col;
      return [=](vf& low, vf& high, __mmask16 first, __mmask16 second) {
        low += scaled((vf)_mm512_maskz_loadu_ps(first, from), first, col);
        high += scaled((vf)_mm512_maskz_loadu_ps(second, from + kLanes), second, col + kLanes);
      };
    });
  body([=, &x](int64_t row, int64_t col) {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + row * x.stride + col;
    return [=](vf& low, vf& high, __mmask16 first, __mmask16 second) {
      low += scaled(upper_halves(_mm256_maskz_loadu_epi16(first, from)), first, col);
      high += scaled(upper_halves(_mm256_maskz_loadu_epi16(second, from + kLanes)), second,
                     col + kLanes);
    };
  });
}

}  // namespace

void lora_reduce(const Matrix& x, const float* panel, int64_t rank, float scale,
                 const Dropout& dropout, float* out, int threads) {
  if (!on_tiles(x.dtype, x.rows, x.cols))
    return avx512::table().lora_reduce(x, panel, rank, scale, dropout, out, threads);
  const int64_t padded = padded_rank(rank), groups = padded / kLanes;
  const int64_t steps = (x.cols + kTileDepth - 1) / kTileDepth;
  const int64_t blocks = (x.rows + kBlockRows - 1) / kBlockRows;
  uint16_t* tiles = tile_scratch<0>(groups * steps * 3 * kTileElements);
  const KeepMask mask(dropout);
#pragma omp parallel num_threads(team(threads, blocks))
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < groups * steps; ++item)
      split_panel(panel, x.cols, padded, item % steps * kTileDepth, item / steps * kLanes,
                  tiles + item * 3 * kTileElements);
    [[maybe_unused]] const UseTiles use;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
      reduce_rows(x, tiles, rank, scale, mask, out, block * kBlockRows);
  }
}

void lora_outer(const Matrix& x, const float* t, int64_t rank, const Dropout& dropout,
                const MutableMatrix& out, bool transposed, int threads) {
  if (!on_tiles(x.dtype, x.rows, x.cols) || rank > kMaxRank)
    return avx512::table().lora_outer(x, t, rank, dropout, out, transposed, threads);
  const int64_t padded = padded_rank(rank), groups = padded / kLanes;
  const int64_t steps = (x.rows + kTileDepth - 1) / kTileDepth;
  const int64_t spans = (x.cols + kMaskSpan - 1) / kMaskSpan;
  uint16_t* tiles = tile_scratch<0>(groups * steps * 3 * kTileElements);
  const KeepMask mask(dropout);
  with_element(out.dtype, [&](auto result) {
    using Result = decltype(result);
#pragma omp parallel num_threads(team(threads, spans))
    {
#pragma omp for schedule(static)
      for (int64_t item = 0; item < groups * steps; ++item)
        split_transposed(t, x.rows, padded, item % steps * kTileDepth, item / steps * kLanes,
                         tiles + item * 3 * kTileElements);
      [[maybe_unused]] const UseTiles use;
#pragma omp for schedule(dynamic)
      for (int64_t span = 0; span < spans; ++span) {
        alignas(64) float sums[kMaxRank * kMaskSpan];
        const int64_t col = span * kMaskSpan, columns = std::min(kMaskSpan, x.cols - col);
        outer_columns(x, tiles, groups, mask, col, sums);
        auto* data = static_cast<typename Result::type*>(out.data);
        for (int64_t r = 0; r < rank; ++r)
          for (int64_t c = 0; c < columns; ++c)
            Result::store_one(
                data + (transposed ? r * out.stride + col + c : (col + c) * out.stride + r),
                sums[r * kMaskSpan + c]);
      }
    }
  });
}

void lora_expand(const float* t, const float* panel, int64_t rank, const ExpandTerms& terms,
                 const Dropout& dropout, const MutableMatrix& out, int threads) {
  // The products of terms left out are too small to matter to what is rounded to 16 bits.
  if (!on_tiles(out.dtype, out.rows, out.cols) || rank == 0 || rank > kMaxRank)
    return avx512::table().lora_expand(t, panel, rank, terms, dropout, out, threads);
  const int64_t groups = padded_rank(rank) / kLanes;
  const int64_t columns = (out.cols + 2 * kLanes - 1) / (2 * kLanes) * 2;  // tiles, an even number
  const int64_t blocks = (out.rows + kBlockRows - 1) / kBlockRows;
  uint16_t* tiles = tile_scratch<0>(columns * groups * 2 * kTileElements);
  const KeepMask mask(dropout);
  with_addend(terms, [&](auto make_addend) {
#pragma omp parallel num_threads(team(threads, blocks))
    {
#pragma omp for schedule(static)
      for (int64_t item = 0; item < columns * groups; ++item)
        split_right(panel, rank, out.cols, item % groups * kLanes, item / groups * kLanes,
                    tiles + item * 2 * kTileElements);
      [[maybe_unused]] const UseTiles use;
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block)
        expand_rows(tiles, t, rank, terms, mask, out, block * kBlockRows, make_addend);
    }
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

// The product that a LoRA layer adds to its output, and to the gradient of its input, on tiles:
// both factors are fp32, and the result is rounded to bf16, so six of the nine products of their
// terms are enough.
#include "amx/lora_blocks.h"

namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

constexpr int64_t kMostGroups = kMaxRank / kLanes;

// The first `count` of 16 lanes.
inline __mmask16 lanes_left(int64_t count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}
inline __mmask32 lanes_of_pair(__mmask16 first, __mmask16 second) {
  return first | static_cast<__mmask32>(second) << kLanes;
}

// Tiles of rows of t for each group of ranks: [t1 t1], [t2 t2], [t1 t3], 16 ranks each.
void split_left(const float* t, int64_t rank, int64_t rows, uint16_t* tiles) {
  constexpr int kLeft[3] = {0, 1, 0}, kRight[3] = {0, 1, 2};
  for (int64_t first = 0; first < rank; first += kLanes) {
    const __mmask16 valid = lanes_left(rank - first);
    for (int64_t i = 0; i < kRowsOfBlock; ++i) {
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

// results [kRowsOfBlock, 2 kLanes] of two tiles of columns, from `tiles` [2, group, 2].
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
  const int64_t groups = padded_rank(rank) / kLanes, rows = std::min(kRowsOfBlock, out.rows - row);
  alignas(64) uint16_t left[kMostGroups * 6 * kTileElements];
  alignas(64) float results[kRowsOfBlock * 2 * kLanes];
  split_left(t + row * rank, rank, rows, left);
  for (int64_t span = 0; span < out.cols; span += kMaskSpan) {
    uint64_t bits[kRowsOfBlock];
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

void lora_expand(const float* t, const float* panel, int64_t rank, const ExpandTerms& terms,
                 const Dropout& dropout, const MutableMatrix& out, int threads) {
  // The products of terms left out are too small to matter to what is rounded to 16 bits.
  if (!on_tiles(out.dtype, out.rows, out.cols) || rank == 0 || rank > kMaxRank)
    return avx512::table().lora_expand(t, panel, rank, terms, dropout, out, threads);
  const int64_t groups = padded_rank(rank) / kLanes;
  const int64_t columns = (out.cols + 2 * kLanes - 1) / (2 * kLanes) * 2;  // tiles, an even number
  const int64_t blocks = (out.rows + kRowsOfBlock - 1) / kRowsOfBlock;
  const TileScratch scratch(columns * groups * 2 * kTileElements);
  uint16_t* tiles = scratch.data();
  const KeepMask mask(dropout);
  with_addend(terms, [&](auto make_addend) {
#pragma omp parallel num_threads(team(threads, blocks, columns* groups))
    {
#pragma omp for schedule(static)
      for (int64_t item = 0; item < columns * groups; ++item)
        split_right(panel, rank, out.cols, item % groups * kLanes, item / groups * kLanes,
                    tiles + item * 2 * kTileElements);
      [[maybe_unused]] const UseTiles use;
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block)
        expand_rows(tiles, t, rank, terms, mask, out, block * kRowsOfBlock, make_addend);
    }
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

// LoRA's products for activations in bf16, on tiles. The fp32 factors go in as three bf16 terms
// each, which is exact, so that the sums are as close to the truth as sums of fp32 products.
//
// Floor: 16 cycles a product of 16 x 16 x 32, and three of them for 32 rows of a factor: a
// fifth of the cycles of fp32 multiply-adds. What is left is to read x and to draw its mask.
#include "amx/long_sums.h"
#include "transpose.h"

namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

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

// sums [16 ranks, kMaskSpan] += terms of t^T [step, 3] times the staged columns.
void outer_block(const uint16_t* terms, const uint16_t* block, int64_t steps, float* sums) {
  for (int64_t two = 0; two < 4; two += 2) {
    const uint16_t* columns = block + two * kTileElements;
    float* sum = sums + two * kLanes;
    add_products<true>(columns, columns + kTileElements, kTileRowBytes, 2 * 4 * kTileElements,
                       terms, steps, sum, sum + kLanes, kMaskSpan);
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

}  // namespace

void lora_reduce(const Matrix& x, const float* panel, int64_t rank, float scale,
                 const Dropout& dropout, float* out, int threads) {
  if (!on_tiles(x.dtype, x.rows, x.cols))
    return avx512::table().lora_reduce(x, panel, rank, scale, dropout, out, threads);
  const int64_t items = tiles_of_terms(x.cols, rank);
  const int64_t blocks = (x.rows + kRowsOfBlock - 1) / kRowsOfBlock;
  const TileScratch scratch(terms_elements(x.cols, rank));
  uint16_t* tiles = scratch.data();
  const KeepMask mask(dropout);
#pragma omp parallel num_threads(team(threads, blocks, items))
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < items; ++item) split_item(panel, x.cols, rank, item, tiles);
    [[maybe_unused]] const UseTiles use;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
      reduce_rows(x, tiles, rank, scale, mask, out + block * kRowsOfBlock * rank,
                  block * kRowsOfBlock);
  }
}

void lora_outer(const Matrix& x, const float* t, int64_t rank, const Dropout& dropout,
                const MutableMatrix& out, bool transposed, int threads) {
  if (!on_tiles(x.dtype, x.rows, x.cols) || rank > kMaxRank)
    return avx512::table().lora_outer(x, t, rank, dropout, out, transposed, threads);
  const int64_t padded = padded_rank(rank), groups = padded / kLanes;
  const int64_t steps = (x.rows + kTileDepth - 1) / kTileDepth;
  const int64_t spans = (x.cols + kMaskSpan - 1) / kMaskSpan;
  const TileScratch scratch(groups * steps * 3 * kTileElements);
  uint16_t* tiles = scratch.data();
  const KeepMask mask(dropout);
  with_element(out.dtype, [&](auto result) {
    using Result = decltype(result);
#pragma omp parallel num_threads(team(threads, spans, groups* steps))
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

}  // namespace fasttune::cpu::FASTTUNE_ISA

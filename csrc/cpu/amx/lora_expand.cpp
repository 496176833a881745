// The product that a LoRA layer adds to its output, and to the gradient of its input, on tiles:
// both factors are fp32, and the result is rounded to bf16, so six of the nine products of their
// terms are enough.
#include "amx/expand_blocks.h"

namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

// All panels of a block of rows.
template <typename Finish>
void expand_rows(const uint16_t* panels, const float* t, int64_t rank, const ExpandTerms& terms,
                 const KeepMask& mask, const MutableMatrix& out, int64_t row, Finish&& finish) {
  constexpr int64_t kMostSteps = kStepsOfRanks * kMaxRank / kLanes;
  const int64_t steps = padded_rank(rank) / kLanes * kStepsOfRanks;
  const int64_t rows = std::min(kRowsOfBlock, out.rows - row);
  alignas(64) uint16_t block[kMostSteps * kStepElements];
  alignas(64) float results[kRowsOfBlock * kColumnsOfPanel];
  const bool drops = !mask.keeps_all();
  split_left(t + row * rank, rank, rows, block);
  for (int64_t span = 0; span < out.cols; span += kMaskSpan) {
    uint64_t bits[kRowsOfBlock];
    for (int64_t i = 0; i < rows; ++i) bits[i] = mask.span(row + i, span);
    const int64_t end = std::min(out.cols, span + kMaskSpan);
    for (int64_t col = span; col < end; col += kColumnsOfPanel) {
      clear_results();
      multiply(packed_block(block), panels + col / kColumnsOfPanel * steps * kStepElements, steps);
      store_results(results);
      finish(
          drops ? nullptr : results, drops ? results : nullptr,
          [&](int64_t i) { return static_cast<uint32_t>(bits[i] >> (col - span)); }, terms, out,
          row, col);
    }
  }
}

}  // namespace

void lora_expand(const float* t, const float* factor, int64_t rank, const ExpandTerms& terms,
                 const Dropout& dropout, const MutableMatrix& out, int threads) {
  // The products of terms left out are too small to matter to what is rounded to 16 bits.
  if (!on_tiles(out.dtype, out.rows, out.cols) || rank == 0 || rank > kMaxRank)
    return avx512::table().lora_expand(t, factor, rank, terms, dropout, out, threads);
  const int64_t steps = padded_rank(rank) / kLanes * kStepsOfRanks;
  const int64_t panels = (out.cols + kColumnsOfPanel - 1) / kColumnsOfPanel;
  const int64_t blocks = (out.rows + kRowsOfBlock - 1) / kRowsOfBlock;
  const TileScratch scratch(panels * steps * kStepElements);
  uint16_t* packed = scratch.data();
  const KeepMask mask(dropout);
  with_finish(terms.addend, out.dtype, [&](auto finish) {
#pragma omp parallel num_threads(team(threads, blocks, panels * steps * 2))
    {
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < panels; ++panel)
        split_right(factor, rank, out.cols, panel * kColumnsOfPanel,
                    packed + panel * steps * kStepElements);
      [[maybe_unused]] const UseTiles use;
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block)
        expand_rows(packed, t, rank, terms, mask, out, block * kRowsOfBlock, finish);
      _mm_sfence();
    }
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

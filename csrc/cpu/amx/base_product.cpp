// The product with a frozen weight in bf16 and what LoRA adds to it, in one pass and with one
// rounding: the terms of LoRA's factors are further steps of the same sums.
//
// Floor: 16 cycles a product of 16 x 16 x 32. x and w are packed as tiles on the way, so that
// operands are read from consecutive lines: a chunk of x that the second-level cache holds, and the
// panel of w that its rows are multiplied with. Packing costs a pass over x, and w once a chunk.
#include "amx/expand_blocks.h"
#include "transpose.h"

namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

constexpr int64_t kChunkBytes = 1664 << 10;  // of packed x: most of a second-level cache of 2 MB
constexpr int64_t kPanelsPacked = 4;         // at a time

inline const uint16_t* at(const Matrix& m, int64_t row, int64_t col) {
  return static_cast<const uint16_t*>(m.data) + row * m.stride + col;
}

// The first `count` of 32 lanes.
inline __mmask32 halves_left(int64_t count) {
  return lanes_of_pair(lanes_left(count), lanes_left(count - kLanes));
}

// The steps of 32 rows of x, zero beyond it.
void pack_rows(const Matrix& x, int64_t row, int64_t steps, uint16_t* block) {
  for (int64_t i = 0; i < kRowsOfBlock; ++i) {
    uint16_t* to = block + i / kTileSide * kTileElements + i % kTileSide * kTileDepth;
    const bool there = row + i < x.rows;
    for (int64_t step = 0; step < steps; ++step, to += kStepElements) {
      const int64_t left = there ? x.cols - step * kTileDepth : 0;
      const uint16_t* from = left > 0 ? at(x, row + i, step * kTileDepth) : to;
      _mm512_store_si512(to, left >= kTileDepth
                                 ? _mm512_loadu_si512(from)
                                 : _mm512_maskz_loadu_epi16(halves_left(left), from));
    }
  }
}

// An interleaved tile of 16 rows of w [N, K] as its columns.
void pack_transposed(const Matrix& w, int64_t row, int64_t k, uint16_t* tile) {
  auto* to = reinterpret_cast<float*>(tile);
  if (row + kTileSide <= w.rows && k + kTileDepth <= w.cols && w.stride % 2 == 0)
    return transpose_16(reinterpret_cast<const float*>(at(w, row, k)), w.stride / 2, to, kLanes);
  alignas(64) uint16_t rows[kTileElements];
  for (int64_t i = 0; i < kTileSide; ++i) {
    const int64_t left = row + i < w.rows ? w.cols - k : 0;
    const uint16_t* from = left > 0 ? at(w, row + i, k) : rows;
    _mm512_store_si512(rows + i * kTileDepth, _mm512_maskz_loadu_epi16(halves_left(left), from));
  }
  transpose_16(reinterpret_cast<const float*>(rows), kLanes, to, kLanes);
}

// The interleaved tiles of 32 rows of w [K, N] for panels `panel_elements` apart.
void pack_pairs(const Matrix& w, int64_t k, int64_t col, int64_t panels, uint16_t* tiles,
                int64_t panel_elements) {
  const bool whole = k + kTileDepth <= w.rows && col + panels * kColumnsOfPanel <= w.cols;
  const auto row = [&](int64_t i, int64_t c, const uint16_t* none) {
    if (whole) return _mm512_loadu_si512(at(w, k + i, c));
    const int64_t left = k + i < w.rows ? w.cols - c : 0;
    return _mm512_maskz_loadu_epi16(halves_left(left), left > 0 ? at(w, k + i, c) : none);
  };
  for (int64_t p = 0; p < kTileSide; ++p, tiles += kTileDepth)
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t c = col + panel * kColumnsOfPanel;
      uint16_t* to = tiles + panel * panel_elements;
      const Interleaved both = interleave_lanes(row(2 * p, c, to), row(2 * p + 1, c, to));
      _mm512_store_si512(to, both.lower);
      _mm512_store_si512(to + kTileElements, both.upper);
    }
}

void pack_panels(const Matrix& w, bool transposed, int64_t col, int64_t panels, int64_t steps,
                 uint16_t* packed, int64_t panel_elements) {
  if (!transposed) {
    // Side by side: a row of w [K, N] may be far from the next, and is then read for all of them.
    for (int64_t step = 0; step < steps; ++step)
      pack_pairs(w, step * kTileDepth, col, panels, packed + step * kStepElements, panel_elements);
    return;
  }
  for (int64_t panel = 0; panel < panels; ++panel, col += kColumnsOfPanel) {
    uint16_t* to = packed + panel * panel_elements;
    for (int64_t step = 0; step < steps; ++step, to += kStepElements) {
      pack_transposed(w, col, step * kTileDepth, to);
      pack_transposed(w, col + kTileSide, step * kTileDepth, to + kTileElements);
    }
  }
}

struct Steps {
  int64_t base, lora;
  int64_t all() const { return base + lora; }
};

// A panel of the output of the chunk's rows from `row`.
template <typename Finish>
void multiply_panel(const uint16_t* chunk, const uint16_t* panel, const Steps& steps,
                    const KeepMask& mask, const ExpandTerms& terms, const MutableMatrix& out,
                    int64_t row, int64_t rows, int64_t col, Finish&& finish) {
  alignas(64) float results[kRowsOfBlock * kColumnsOfPanel],
      dropped[kRowsOfBlock * kColumnsOfPanel];
  const bool drops = !mask.keeps_all() && steps.lora > 0;
  for (int64_t end = row + rows; row < end; row += kRowsOfBlock) {
    multiply(chunk, panel, drops ? steps.base : steps.all());
    store_results(results);
    if (drops) {
      multiply(chunk + steps.base * kStepElements, panel + steps.base * kStepElements, steps.lora);
      store_results(dropped);
    }
    finish(
        results, drops ? dropped : nullptr,
        [&](int64_t i) {
          return static_cast<uint32_t>(mask.span(row + i, col / kMaskSpan * kMaskSpan) >>
                                       col % kMaskSpan);
        },
        terms, out, row, col);
    chunk += steps.all() * kStepElements;
  }
}

}  // namespace

void base_product(const Matrix& x, const Matrix& w, bool transposed, const float* t,
                  const float* factor, int64_t rank, const ExpandTerms& terms,
                  const Dropout& dropout, const MutableMatrix& out, int threads) {
  const Steps steps{(x.cols + kTileDepth - 1) / kTileDepth,
                    padded_rank(rank) / kLanes * kStepsOfRanks};
  const int64_t blocks = (x.rows + kRowsOfBlock - 1) / kRowsOfBlock;
  const int64_t panels = (out.cols + kColumnsOfPanel - 1) / kColumnsOfPanel;
  const int64_t block_elements = steps.all() * kStepElements, panel_elements = block_elements;
  const int64_t chunk_blocks =
      std::min(blocks, std::max<int64_t>(1, kChunkBytes / (2 * block_elements)));
  const int parts = team(threads, panels, 0);  // of the panels, one for each thread
  const int64_t part_elements = std::min(kPanelsPacked, panels) * panel_elements;
  const TileScratch scratch(chunk_blocks * block_elements + parts * part_elements + kReadAhead);
  uint16_t* chunk = scratch.data();
  const KeepMask mask(dropout);
  with_finish(terms, out.dtype, [&](auto finish) {
#pragma omp parallel num_threads(parts)
    {
      [[maybe_unused]] const UseTiles use;
      for (int64_t first = 0; first < blocks; first += chunk_blocks) {
        const int64_t here = std::min(chunk_blocks, blocks - first);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < here; ++block) {
          const int64_t row = (first + block) * kRowsOfBlock;
          uint16_t* to = chunk + block * block_elements;
          pack_rows(x, row, steps.base, to);
          split_left(t + row * rank, rank, std::min(kRowsOfBlock, x.rows - row),
                     to + steps.base * kStepElements);
        }
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; ++part) {
          uint16_t* packed = chunk + chunk_blocks * block_elements + part * part_elements;
          const int64_t end = panels * (part + 1) / parts;
          for (int64_t panel = panels * part / parts; panel < end; panel += kPanelsPacked) {
            const int64_t count = std::min(kPanelsPacked, end - panel);
            pack_panels(w, transposed, panel * kColumnsOfPanel, count, steps.base, packed,
                        panel_elements);
            for (int64_t i = 0; i < count; ++i) {
              const int64_t col = (panel + i) * kColumnsOfPanel;
              uint16_t* own = packed + i * panel_elements;
              split_right(factor, rank, out.cols, col, own + steps.base * kStepElements);
              multiply_panel(chunk, own, steps, mask, terms, out, first * kRowsOfBlock,
                             here * kRowsOfBlock, col, finish);
            }
          }
        }
      }
    }
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

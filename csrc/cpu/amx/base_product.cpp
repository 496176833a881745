// The product with a frozen weight in bf16 and what LoRA adds to it, in one pass and with one
// rounding: the terms of LoRA's factors are further steps of the same sums.
//
// Floor: 16 cycles a product of 16 x 16 x 32. Rows of x are taken a chunk at a time that the
// second-level cache holds, and a panel of w is packed as tiles for all of them. x is read where it
// lies, unless its rows would compete for the same lines of the caches.
#include <atomic>
#include <numeric>
#include <vector>

#include "amx/expand_blocks.h"
#include "amx/long_sums.h"
#include "amx/packing.h"

namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

constexpr int64_t kChunkBytes = 1664 << 10;  // of packed x: most of a second-level cache of 2 MB
// Panels packed at a time. A row of w [K, N] may be far from the next, and is then read for all of
// them; a panel of w [N, K] is read from rows of its own, and best used at once.
constexpr int64_t kPanelsPacked = 4, kTransposedPacked = 1;

void pack_panels(const Matrix& w, bool transposed, int64_t col, int64_t panels, int64_t steps,
                 uint16_t* packed, int64_t panel_elements) {
  if (!transposed) {
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

// The part of the output that a thread computes, with operands that it packs for itself: threads
// that share packed ones wait for each other's caches.
struct Part {
  int64_t first_block, end_block;  // of rows
  int64_t first_panel, end_panel;
};

// Rows are shared out as long as every thread keeps enough of them for a panel of w to be worth its
// packing, columns beyond that, and first where w has many more columns than x has rows: a thread
// packs the panels of its columns alone.
struct Grid {
  int64_t blocks, panels, row_parts, panel_parts;

  Grid(int64_t blocks_of_rows, int64_t cols, int threads)
      : blocks(blocks_of_rows), panels((cols + kColumnsOfPanel - 1) / kColumnsOfPanel) {
    constexpr int64_t kBlocksWorthPacking = 8, kManyMore = 8;
    const int64_t worth = panels < kManyMore * blocks ? blocks / kBlocksWorthPacking : 1;
    row_parts = std::max<int64_t>(1, std::min<int64_t>(threads, worth));
    panel_parts = std::max<int64_t>(1, std::min(threads / row_parts, panels));
  }
  int64_t parts() const { return row_parts * panel_parts; }
  Part part(int64_t index) const {
    const int64_t r = index / panel_parts, p = index % panel_parts;
    return {blocks * r / row_parts, blocks * (r + 1) / row_parts, panels * p / panel_parts,
            panels * (p + 1) / panel_parts};
  }
};

// Up to 32 rows of a run.
struct RowsOfRun {
  const Run* run;
  int64_t row;

  int64_t rows() const { return std::min(kRowsOfBlock, run->end - row); }
};

std::vector<RowsOfRun> blocks_of(const Run* runs, int64_t count) {
  std::vector<RowsOfRun> blocks;
  for (const Run* run = runs; run < runs + count; ++run)
    for (int64_t row = run->first; row < run->end; row += kRowsOfBlock)
      blocks.push_back({run, row});
  return blocks;
}

struct Call {
  const Matrix& x;
  const Matrix& w;
  bool transposed;
  const std::vector<RowsOfRun>& blocks;
  const Matrix* addend;
  const ScaledProduct* product;
  const MutableMatrix& out;
  Steps steps;         // of a panel: as many of LoRA as any run has
  int64_t reductions;  // elements of the largest panel of a reduction, as tiles

  Call(const Matrix& rows, const Matrix& weight, bool transposed_weight,
       const std::vector<RowsOfRun>& blocks_of_rows, const Matrix* added, const ScaledProduct* kept,
       const MutableMatrix& result)
      : x(rows),
        w(weight),
        transposed(transposed_weight),
        blocks(blocks_of_rows),
        addend(added),
        product(kept),
        out(result),
        steps{(x.cols + kTileDepth - 1) / kTileDepth, 0},
        reductions(0) {
    for (const RowsOfRun& block : blocks) {
      const int64_t rank = block.run->rank;
      steps.lora = std::max(steps.lora, steps_of_ranks(rank));
      if (block.run->reduction) reductions = std::max(reductions, terms_elements(x.cols, rank));
    }
  }
  static int64_t steps_of_ranks(int64_t rank) { return padded_rank(rank) / kLanes * kStepsOfRanks; }
  // Rows apart by a multiple of 2048 bytes share two sets of the first-level cache.
  bool in_place() const { return x.cols % kTileDepth == 0 && 2 * x.stride % 2048 != 0; }
  bool in_place(const RowsOfRun& block) const {
    return in_place() && block.row + kRowsOfBlock <= x.rows;
  }
  // The first of the blocks that reach beyond x, which come last; all that are packed where x is
  // read in place.
  int64_t first_packed() const {
    if (!in_place()) return 0;
    auto first = static_cast<int64_t>(blocks.size());
    while (first > 0 && !in_place(blocks[first - 1])) --first;
    return first;
  }
  int64_t panel_elements() const { return steps.all() * kStepElements; }
  int64_t chunk_blocks() const {
    return std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, 2 * panel_elements()));
  }
};

// The panel of a run's reduction as tiles of terms; runs that come one after the other share them.
class ReductionTiles {
 public:
  explicit ReductionTiles(uint16_t* tiles) : tiles_(tiles) {}
  const uint16_t* of(const Run& run, int64_t depth) {
    const float* panel = run.reduction->panel;
    if (panel != panel_)
      for (int64_t item = 0; item < tiles_of_terms(depth, run.rank); ++item)
        split_item(panel, depth, run.rank, item, tiles_);
    panel_ = panel;
    return tiles_;
  }

 private:
  uint16_t* tiles_;
  const float* panel_ = nullptr;
};

// Blocks of rows of x and their steps of LoRA, packed where x cannot be read in place.
class Chunk {
 public:
  // Elements of the buffer for `blocks` blocks.
  static int64_t elements(const Call& call, int64_t blocks) {
    const int64_t packed =
        std::min(blocks, static_cast<int64_t>(call.blocks.size()) - call.first_packed());
    return (packed * call.steps.base + blocks * call.steps.lora) * kStepElements;
  }
  // Of the threads that share rows, one `writes` t.
  Chunk(const Call& call, int64_t first, int64_t count, ReductionTiles& terms, bool writes,
        uint16_t* buffer)
      : call_(call),
        blocks_(call.blocks.data() + first),
        first_packed_(std::max<int64_t>(0, call.first_packed() - first)),
        lora_(buffer),
        rows_(buffer + count * lora_elements()) {
    for (int64_t i = 0; i < count; ++i) {
      const auto& [run, row] = blocks_[i];
      const int64_t rows = blocks_[i].rows();
      alignas(64) float reduced[kRowsOfBlock * kMaxRank];
      const float* t = run->t + (row - run->first) * run->rank;
      if (const Reduction* reduction = run->reduction) {
        Matrix own = call.x;
        own.data = at(call.x, run->first, 0);
        own.rows = run->end - run->first;
        reduce_rows(own, terms.of(*run, own.cols), run->rank, reduction->scale,
                    KeepMask(reduction->dropout), reduced, row - run->first);
        if (writes)
          std::copy_n(reduced, rows * run->rank, reduction->out + (row - run->first) * run->rank);
        t = reduced;
      }
      split_left(t, run->rank, rows, lora_ + i * lora_elements());
      if (!in_place(i)) pack_rows(call.x, row, call.steps.base, packed(i));
    }
  }
  const RowsOfRun& rows(int64_t i) const { return blocks_[i]; }
  Block base(int64_t i) const {
    if (!in_place(i)) return packed_block(packed(i));
    const int64_t row = blocks_[i].row;
    return {at(call_.x, row, 0), at(call_.x, row + kTileSide, 0), 2 * call_.x.stride, kTileDepth};
  }
  Block lora(int64_t i) const { return packed_block(lora_ + i * lora_elements()); }

 private:
  int64_t lora_elements() const { return call_.steps.lora * kStepElements; }
  bool in_place(int64_t i) const { return call_.in_place(blocks_[i]); }
  uint16_t* packed(int64_t i) const {
    return rows_ + (i - first_packed_) * call_.steps.base * kStepElements;
  }

  const Call& call_;
  const RowsOfRun* blocks_;
  int64_t first_packed_;  // of the chunk's blocks
  uint16_t *lora_, *rows_;
};

// The part of the panel of w [N, K] from `row` that product i of `count` asks for, so that the
// panel lies in the second-level cache when it is packed. (Panels of w [K, N] are too large for
// that.)
Ahead next_panel(const Matrix& w, int64_t row, int64_t i, int64_t count) {
  const int64_t each = (kColumnsOfPanel + count - 1) / count, skipped = i * each;
  const int64_t rows = std::min({each, kColumnsOfPanel - skipped, w.rows - row - skipped});
  if (rows <= 0) return {};
  return {at(w, row + skipped, 0), w.stride, rows};
}

// The panel's columns of the output of a chunk's `count` blocks. The panel has room for the steps
// of a run behind those of w.
template <typename Finish>
void multiply_panel(const Call& call, const Chunk& chunk, int64_t count, uint16_t* panel,
                    int64_t col, int64_t end_col, Finish&& finish) {
  alignas(64) float results[kRowsOfBlock * kColumnsOfPanel], branch[kRowsOfBlock * kColumnsOfPanel];
  uint16_t* factor = panel + call.steps.base * kStepElements;
  const Run* run = nullptr;
  KeepMask mask(Dropout{});
  MutableMatrix out = call.out;
  int64_t steps = 0;
  bool apart = false;
  for (int64_t i = 0; i < count; ++i) {
    const RowsOfRun& rows = chunk.rows(i);
    if (rows.run != run) {
      run = rows.run;
      mask = KeepMask(run->dropout);
      out.rows = run->end;
      steps = Call::steps_of_ranks(run->rank);
      split_right(run->panel, run->rank, out.cols, col, factor);
      apart = steps > 0 && (call.product || !mask.keeps_all());
    }
    clear_results();
    if (apart) {
      multiply(chunk.lora(i), factor, steps);
      store_results(branch);
      clear_results();
    }
    const int64_t next = col + kColumnsOfPanel;
    multiply(chunk.base(i), panel, call.steps.base,
             call.transposed && next < end_col ? next_panel(call.w, next, i, count) : Ahead{});
    if (!apart) multiply(chunk.lora(i), factor, steps);
    store_results(results);
    if (call.product) scale_product(*call.product, rows.rows(), out.cols, results, rows.row, col);
    const auto bits = [&](int64_t r) {
      const uint64_t span = mask.span(rows.row - run->first + r, col / kMaskSpan * kMaskSpan);
      return static_cast<uint32_t>(span >> col % kMaskSpan);
    };
    finish(results, apart ? branch : nullptr, bits, ExpandTerms{call.addend, nullptr, run->bias},
           out, rows.row, col);
  }
}

template <typename Finish>
void multiply_part(const Call& call, const Part& part, uint16_t* buffer, Finish&& finish) {
  const int64_t elements = call.panel_elements(), base = call.steps.base;
  const int64_t together = call.transposed ? kTransposedPacked : kPanelsPacked;
  uint16_t *packed = buffer, *terms = packed + kPanelsPacked * elements;
  ReductionTiles reductions(terms);
  for (int64_t first = part.first_block; first < part.end_block; first += call.chunk_blocks()) {
    const int64_t count = std::min(call.chunk_blocks(), part.end_block - first);
    const Chunk chunk(call, first, count, reductions, part.first_panel == 0,
                      terms + call.reductions);
    for (int64_t panel = part.first_panel; panel < part.end_panel; panel += together) {
      const int64_t panels = std::min(together, part.end_panel - panel);
      pack_panels(call.w, call.transposed, panel * kColumnsOfPanel, panels, base, packed, elements);
      for (int64_t i = 0; i < panels; ++i)
        multiply_panel(call, chunk, count, packed + i * elements, (panel + i) * kColumnsOfPanel,
                       part.end_panel * kColumnsOfPanel, finish);
    }
  }
}

int64_t buffer_elements(const Call& call, const Grid& grid) {
  const int64_t blocks = (grid.blocks + grid.row_parts - 1) / grid.row_parts;
  return kPanelsPacked * call.panel_elements() + call.reductions +
         Chunk::elements(call, std::min(call.chunk_blocks(), blocks));
}

// Calls body(index, buffer) for indices below `count`, shared out among threads, with the tiles in
// use.
template <typename Body>
void on_threads(int threads, int64_t count, int64_t elements, Body&& body) {
  std::atomic<bool> no_memory{false};  // nothing may be thrown out of a parallel region
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t index = 0; index < count; ++index) try {
      const TileScratch scratch(elements);
      [[maybe_unused]] const UseTiles use;
      body(index, scratch.data());
      _mm_sfence();
    } catch (const std::bad_alloc&) {
      no_memory = true;
    }
  if (no_memory) throw std::bad_alloc();
}

constexpr int64_t kDepthOfPass = 1536;

// Columns [first, first + kDepthOfPass) of x, and what they are multiplied by.
struct Pass {
  Matrix x, w;

  Pass(const Matrix& all_x, const Matrix& all_w, bool transposed, int64_t first)
      : x(all_x), w(all_w) {
    const int64_t depth = std::min(kDepthOfPass, all_x.cols - first);
    x.data = at(all_x, 0, first), x.cols = depth;
    w.data = transposed ? at(all_w, 0, first) : at(all_w, first, 0);
    (transposed ? w.cols : w.rows) = depth;
  }
};

}  // namespace

// The depth goes in passes, of which the second-level cache holds the rows of x. Parts of the depth
// have sums of their own, which are added in the end, so that each thread reads its part of x and w
// alone.
void deep_product(const Matrix& x, const Matrix& w, bool transposed, const MutableMatrix& out,
                  float* partial, int threads) {
  const int64_t passes = (x.cols + kDepthOfPass - 1) / kDepthOfPass;
  const int64_t sums = std::max<int64_t>(1, std::min(passes, kDeepSums));
  // As many parts for each of the sums as give every thread the same number of them.
  const Grid grid((out.rows + kRowsOfBlock - 1) / kRowsOfBlock, out.cols,
                  static_cast<int>(threads / std::gcd(int64_t{threads}, sums)));
  const int64_t size = out.rows * out.cols;
  const auto sums_of = [&](int64_t i) {
    MutableMatrix own = out;
    if (i > 0) own.data = partial + (i - 1) * size, own.stride = out.cols;
    return own;
  };
  const Run all{0, out.rows, nullptr, nullptr, nullptr, 0, nullptr, Dropout{}};
  const std::vector<RowsOfRun> blocks = blocks_of(&all, 1);
  const auto with_pass = [&](int64_t pass, const Matrix* addend, const MutableMatrix& own,
                             auto&& body) {
    const Pass operands(x, w, transposed, pass * kDepthOfPass);
    body(Call(operands.x, operands.w, transposed, blocks, addend, nullptr, own));
  };
  int64_t elements = 0;
  for (const int64_t pass : {int64_t{0}, passes - 1})  // the last one may have to be packed
    with_pass(pass, nullptr, out, [&](const Call& call) {
      elements = std::max(elements, buffer_elements(call, grid));
    });
  on_threads(threads, sums * grid.parts(), elements, [&](int64_t index, uint16_t* buffer) {
    const int64_t i = index / grid.parts(), first = passes * i / sums;
    const MutableMatrix own = sums_of(i);
    const Matrix before{own.data, own.rows, own.cols, own.stride, DType::kFloat32};
    for (int64_t pass = first; pass < passes * (i + 1) / sums; ++pass) {
      with_pass(pass, pass > first ? &before : nullptr, own, [&](const Call& call) {
        with_finish(call.addend, DType::kFloat32, [&](auto finish) {
          multiply_part(call, grid.part(index % grid.parts()), buffer, finish);
        });
      });
    }
  });
  for (int64_t i = 1; i < sums; ++i)
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < out.rows; ++row) {
      float* to = static_cast<float*>(out.data) + row * out.stride;
      const float* from = partial + (i - 1) * size + row * out.cols;
      for (int64_t j = 0; j < out.cols; ++j) to[j] += from[j];
    }
}

void base_product(const Matrix& x, const Matrix& w, bool transposed, const Run* runs, int64_t count,
                  const Matrix* addend, const ScaledProduct* product, const MutableMatrix& out,
                  int threads) {
  const std::vector<RowsOfRun> blocks = blocks_of(runs, count);
  const Call call(x, w, transposed, blocks, addend, product, out);
  const Grid grid(static_cast<int64_t>(blocks.size()), out.cols, threads);
  with_finish(addend, out.dtype, [&](auto finish) {
    const auto parts = static_cast<int>(grid.parts());
    on_threads(parts, parts, buffer_elements(call, grid), [&](int64_t index, uint16_t* buffer) {
      multiply_part(call, grid.part(index), buffer, finish);
    });
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

// Norms of the rows of a weight in bf16 with an adapter, on tiles, and its products with a few rows
// of x. A goes in as three terms (long_sums.h), x and the weight as they are.
//
// Floor: w is read once. With R = 16 and 16 rows of x, a kilobyte of it takes four products of 16
// cycles and 4 KB of tiles from the second-level cache.
#include "row_norms.h"

#include "amx/long_sums.h"
#include "amx/packing.h"

namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

constexpr int64_t kTilesOfX = 2;  // of 16 rows
constexpr int64_t kTermTiles = 3 * kTileElements;

// The panel of A as tiles of terms [group, step, 3], x as tiles [step, kTilesOfX].
struct Operands {
  int64_t depth, rank, steps, rows_of_x;
  uint16_t *terms, *x;

  static int64_t elements(int64_t depth, int64_t rank) {
    return terms_elements(depth, rank) + tiles_of_terms(depth, 1) * kTilesOfX * kTileElements;
  }
  int64_t groups() const { return padded_rank(rank) / kLanes; }
};

// What is known of 32 rows of the weight.
struct Sums {
  alignas(64) float cross[kRowsOfBlock * kMaxRank];
  alignas(64) float squares[kRowsOfBlock * kLanes];  // in lanes
  alignas(64) float x[kTilesOfX][kRowsOfBlock * kLanes];

  void clear(int64_t padded) {
    std::fill_n(cross, kRowsOfBlock * padded, 0.0f);
    std::memset(squares, 0, sizeof squares + sizeof x);
  }
};

inline void add_tile(const float* from, float* sums) {
  for (int64_t i = 0; i < kTileSide * kLanes; i += kLanes)
    store(sums + i, load(sums + i) + load(from + i));
}

// sums += 16 rows of the weight times a group of terms [step, 3] and the tiles of x [step,
// kTilesOfX]. As in add_products, the small terms are summed apart.
template <int TilesOfX>
void add_rows(const uint16_t* rows, int64_t stride, const uint16_t* terms, const uint16_t* x,
              int64_t steps, float* cross, int64_t padded, float* x0, float* x1) {
  alignas(64) float leading[kTileSide * kLanes], rest[kTileSide * kLanes];
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t step = 0; step < steps; ++step, rows += kTileDepth, terms += kTermTiles) {
    tile_load<4>(rows, stride);
    tile_load<5>(terms, kTileRowBytes);
    tile_dot<0, 4, 5>();
    tile_load<6>(terms + kTileElements, kTileRowBytes);
    tile_dot<1, 4, 6>();
    tile_load<7>(terms + 2 * kTileElements, kTileRowBytes);
    tile_dot<1, 4, 7>();
    if constexpr (TilesOfX > 0) {
      tile_load<5>(x, kTileRowBytes);
      tile_dot<2, 4, 5>();
      if constexpr (TilesOfX > 1) {
        tile_load<6>(x + kTileElements, kTileRowBytes);
        tile_dot<3, 4, 6>();
      }
      x += kTilesOfX * kTileElements;
    }
  }
  tile_store<0>(leading, kTileRowBytes), tile_store<1>(rest, kTileRowBytes);
  add_tiles(leading, rest, cross, padded);
  if constexpr (TilesOfX > 0) {
    tile_store<2>(leading, kTileRowBytes);
    add_tile(leading, x0);
  }
  if constexpr (TilesOfX > 1) {
    tile_store<3>(rest, kTileRowBytes);
    add_tile(rest, x1);
  }
}

// squares[i] += those of a row's columns, and the rows that come next are asked for.
void add_squares(const uint16_t* rows, int64_t stride, int64_t steps, const uint16_t* next,
                 float* squares) {
  for (int64_t i = 0; i < kTileSide; ++i) {
    __m512 sum = _mm512_load_ps(squares + i * kLanes);
    for (int64_t step = 0; step < steps; ++step) {
      const auto v = (__m512bh)_mm512_loadu_si512(rows + i * stride + step * kTileDepth);
      sum = _mm512_dpbf16_ps(sum, v, v);
      _mm_prefetch(next + i * stride + step * kTileDepth, _MM_HINT_T0);
    }
    _mm512_store_ps(squares + i * kLanes, sum);
  }
}

void add_columns(const Matrix& w, const Operands& operands, int64_t row, int64_t step, Sums& sums) {
  alignas(64) uint16_t staged[kRowsOfBlock * kSumDepth];
  const int64_t steps = std::min(kSumSteps, operands.steps - step), col = step * kTileDepth;
  const int64_t padded = padded_rank(operands.rank);
  const bool whole = row + kRowsOfBlock <= w.rows && col + steps * kTileDepth <= w.cols;
  if (!whole) stage_rows(w, KeepMask(Dropout{}), row, col, staged);
  const uint16_t* rows = whole ? at(w, row, col) : staged;
  const int64_t stride = whole ? w.stride : kSumDepth;
  const uint16_t* x = operands.x + step * kTilesOfX * kTileElements;
  const bool last = step + steps >= operands.steps;
  for (int64_t half = 0; half < 2; ++half, rows += kTileSide * stride) {
    const uint16_t* next = rows + (half ? kSumDepth - kTileSide * stride : kTileSide * stride);
    if (last && half) next = rows;
    float *x0 = sums.x[0] + half * kTileSide * kLanes, *x1 = sums.x[1] + half * kTileSide * kLanes;
    for (int64_t group = 0; group < operands.groups(); ++group) {
      const uint16_t* terms = operands.terms + (group * operands.steps + step) * kTermTiles;
      float* cross = sums.cross + half * kTileSide * padded + group * kLanes;
      const int64_t wanted = group ? 0 : (operands.rows_of_x + kTileSide - 1) / kTileSide;
      const auto add = wanted == 0 ? add_rows<0> : wanted == 1 ? add_rows<1> : add_rows<2>;
      add(rows, 2 * stride, terms, x, steps, cross, padded, x0, x1);
    }
    add_squares(rows, stride, steps, next, sums.squares + half * kTileSide * kLanes);
  }
}

template <typename T>
void put_product(const Sums& sums, int64_t row, int64_t rows, const MutableMatrix& product) {
  for (int64_t m = 0; m < product.rows; ++m) {
    T* to = static_cast<T*>(product.data) + m * product.stride + row;
    const float* from = sums.x[m / kTileSide] + m % kTileSide;
    alignas(64) float line[kRowsOfBlock];
    for (int64_t i = 0; i < kRowsOfBlock; ++i) line[i] = from[i * kLanes];
    store_row<true>(to, {load(line), load(line + kLanes)}, lower_floats(rows),
                    lower_floats(rows - kLanes));
  }
}

}  // namespace

void row_norms(const Matrix& w, const float* panel, int64_t rank, const float* b,
               const float* through, float scale, float* out, const Matrix* x,
               const MutableMatrix* product, int threads) {
  const bool fits = !x || (x->dtype == DType::kBFloat16 && x->rows <= kTilesOfX * kTileSide);
  if (!on_tiles(w.dtype, w.rows, w.cols) || !fits)
    return avx512::table().row_norms(w, panel, rank, b, through, scale, out, x, product, threads);
  const int64_t items = tiles_of_terms(w.cols, rank), steps = tiles_of_terms(w.cols, 1);
  const int64_t blocks = (w.rows + kRowsOfBlock - 1) / kRowsOfBlock;
  const TileScratch scratch(Operands::elements(w.cols, rank));
  const Operands operands{w.cols,         rank,
                          steps,          x ? x->rows : 0,
                          scratch.data(), scratch.data() + terms_elements(w.cols, rank)};
#pragma omp parallel num_threads(team(threads, blocks, items))
  {
#pragma omp for schedule(static) nowait
    for (int64_t item = 0; item < items; ++item)
      split_item(panel, w.cols, rank, item, operands.terms);
#pragma omp for schedule(static)
    for (int64_t step = 0; step < (x ? steps : 0); ++step)
      for (int64_t tile = 0; tile < kTilesOfX; ++tile)
        pack_transposed(*x, tile * kTileSide, step * kTileDepth,
                        operands.x + (step * kTilesOfX + tile) * kTileElements);
    [[maybe_unused]] const UseTiles use;
    Sums sums;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = block * kRowsOfBlock, rows = std::min(kRowsOfBlock, w.rows - row);
      const int64_t padded = padded_rank(rank);
      sums.clear(padded);
      for (int64_t step = 0; step < steps; step += kSumSteps)
        add_columns(w, operands, row, step, sums);
      for (int64_t i = 0; i < rows; ++i) {
        const double squares = _mm512_reduce_add_ps(_mm512_load_ps(sums.squares + i * kLanes));
        out[row + i] = row_norm(squares, sums.cross + i * padded, b, through, row + i, rank, scale);
      }
      if (!x) continue;
      if (product->dtype == DType::kFloat32)
        put_product<float>(sums, row, rows, *product);
      else
        put_product<uint16_t>(sums, row, rows, *product);
    }
  }
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

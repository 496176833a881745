#include "reft.h"

#include <algorithm>

#include "activation.h"
#include "keep_mask.h"
#include "staging.h"

// Floor per listed row: 4 R H multiply-adds against 2 H elements read and H written; with R = 16 a
// row of bf16 is bound by arithmetic. A program holds a few rows, so that each vector of R and W
// that is loaded serves all of them, and walks over them twice: into the subspace and back.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

// Sums that a build holds in registers beside the operands.
#if defined(__AVX512F__)
constexpr int kRows = 4, kRanks = 4;
#else
constexpr int kRows = 2, kRanks = 2;
#endif
constexpr int64_t kColumns = 1024;  // of a tile: 4 rows of it are half a first-level cache

struct Rows {
  int64_t first, count;  // in the list
  int64_t index[kRows];  // in the matrix; negative: none
};

inline Rows rows_of(const ReftCall& call, int64_t block) {
  Rows rows{block * kRows, std::min<int64_t>(kRows, call.count - block * kRows), {}};
  for (int64_t i = 0; i < rows.count; ++i)
    rows.index[i] = call.rows ? call.rows[rows.first + i] : rows.first + i;
  return rows;
}

inline char* at(void* data, DType dtype, int64_t stride, int64_t row, int64_t col) {
  return static_cast<char*>(data) + (row * stride + col) * size_of(dtype);
}
inline const char* at(const Matrix& x, int64_t row, int64_t col) {
  return at(const_cast<void*>(x.data), x.dtype, x.stride, row, col);
}

// The rows from column `col` on as fp32, zero where there is none.
inline void load_rows(const Matrix& x, const Rows& rows, int64_t col, int64_t valid, float* tile) {
  std::fill_n(tile, kRows * kColumns, 0.0f);
  for (int64_t i = 0; i < rows.count; ++i)
    if (rows.index[i] >= 0) widen(at(x, rows.index[i], col), x.dtype, valid, tile + i * kColumns);
}

// keep * scale, with the place in the list as the row.
inline void drop_rows(const ReftCall& call, const KeepMask& mask, const Rows& rows, int64_t col,
                      int64_t valid, float* tile) {
  if (mask.keeps_all()) return;
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t span = 0; span < valid; span += kMaskSpan) {
      const uint64_t bits = mask.span(rows.first + i, col + span);
      for (int64_t j = 0; j < kMaskSpan; j += kLanes) {
        float* lanes = tile + i * kColumns + span + j;
        store(lanes,
              keep_lanes(load(lanes) * call.scale, static_cast<uint32_t>(bits >> j) & 0xffffu));
      }
    }
}

inline void store_rows(const float* tile, const Rows& rows, int64_t col, int64_t valid,
                       const MutableMatrix& out) {
  for (int64_t i = 0; i < rows.count; ++i)
    if (rows.index[i] >= 0)
      narrow(tile + i * kColumns, valid, out.dtype,
             at(out.data, out.dtype, out.stride, rows.index[i], col));
}

// The rows as they came, one below the other as in the list.
inline void store_list(const float* tile, const Rows& rows, int64_t col, int64_t valid,
                       const MutableMatrix& out) {
  for (int64_t i = 0; i < rows.count; ++i)
    narrow(tile + i * kColumns, valid, out.dtype,
           at(out.data, out.dtype, out.stride, rows.first + i, col));
}

// sums[i, r] += tile[i] . lines[r] over `columns`, a multiple of kLanes.
inline void add_dots(const float* tile, const float* lines, int64_t stride, int64_t rank,
                     int64_t columns, float* sums) {
  for (int64_t r = 0; r < rank; r += kRanks) {
    const float* line[kRanks];
    for (int q = 0; q < kRanks; ++q) line[q] = lines + std::min(r + q, rank - 1) * stride;
    vf acc[kRows][kRanks] = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
      vf factor[kRanks];
      for (int q = 0; q < kRanks; ++q) factor[q] = load(line[q] + j);
      for (int i = 0; i < kRows; ++i) {
        const vf value = load(tile + i * kColumns + j);
        for (int q = 0; q < kRanks; ++q) acc[i][q] += value * factor[q];
      }
    }
    for (int i = 0; i < kRows; ++i)
      for (int64_t q = 0; q < std::min<int64_t>(kRanks, rank - r); ++q)
        sums[i * kMaxRank + r + q] += fold_sum(acc[i][q]);
  }
}

// tile[i] += sum_r factors[i, r] lines[r] over `columns`, a multiple of kLanes. Summed in short
// runs on their own: one long sum is several times less exact than a product of the vendor's.
inline void add_lines(const float* factors, const float* lines, int64_t stride, int64_t rank,
                      int64_t columns, float* tile) {
  constexpr int64_t kRun = 16;
  for (int64_t j = 0; j < columns; j += kLanes) {
    vf total[kRows] = {};
    for (int64_t first = 0; first < rank; first += kRun) {
      vf acc[kRows] = {};
      for (int64_t r = first; r < std::min(first + kRun, rank); ++r) {
        const vf line = load(lines + r * stride + j);
        for (int i = 0; i < kRows; ++i) acc[i] += splat(factors[i * kMaxRank + r]) * line;
      }
      for (int i = 0; i < kRows; ++i) total[i] += acc[i];
    }
    for (int i = 0; i < kRows; ++i)
      store(tile + i * kColumns + j, load(tile + i * kColumns + j) + total[i]);
  }
}

// body(value, slope) of act at each z of the rows; z has kMaxRank columns, a multiple of kLanes.
template <typename Body>
void activate(const ReftCall& call, const float* z, Body&& body) {
  for (int i = 0; i < kRows; ++i)
    for (int64_t r = 0; r < call.rank; r += kRegisterLanes) {
      const int64_t place = i * kMaxRank + r;
      const vr value = load_vr(z + place);
      if (call.activation < 0)
        body(place, value, splat_vr(1.0f));
      else
        with_activation(static_cast<Activation>(call.activation), [&](auto act) {
          const Jet jet = decltype(act)::jet(value);
          body(place, jet.value, jet.slope);
        });
    }
}

// The first `rank` numbers of the rows to [P, R]; zero for an entry that names no row.
inline void store_sums(const float* sums, const ReftCall& call, const Rows& rows, float* out) {
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t r = 0; r < call.rank; ++r)
      out[(rows.first + i) * call.rank + r] = rows.index[i] < 0 ? 0.0f : sums[i * kMaxRank + r];
}

inline int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

void forward_block(const Matrix& h, const ReftCall& call, const MutableMatrix& y,
                   const MutableMatrix* x, float* z, float* d, int64_t block) {
  const Rows rows = rows_of(call, block);
  const KeepMask mask(call.dropout);
  alignas(64) float tile[kRows * kColumns];
  alignas(64) float inner[kRows * kMaxRank] = {}, rotated[kRows * kMaxRank] = {};
  for (int64_t col = 0; col < h.cols; col += kColumns) {
    const int64_t valid = std::min(kColumns, h.cols - col), columns = padded(valid);
    load_rows(h, rows, col, valid, tile);
    if (x) store_list(tile, rows, col, valid, *x);
    add_dots(tile, call.source + col, call.stride, call.rank, columns, inner);
    if (call.difference)
      add_dots(tile, call.rotation + col, call.stride, call.rank, columns, rotated);
  }
  if (call.bias)
    for (int i = 0; i < kRows; ++i)
      for (int64_t r = 0; r < call.rank; ++r) inner[i * kMaxRank + r] += call.bias[r];
  store_sums(inner, call, rows, z);
  activate(call, inner, [&](int64_t place, vr value, vr) {
    const vr change = value - load_vr(rotated + place);
    std::memcpy(rotated + place, &change, sizeof change);
  });
  store_sums(rotated, call, rows, d);
  for (int64_t col = 0; col < h.cols; col += kColumns) {
    const int64_t valid = std::min(kColumns, h.cols - col);
    load_rows(h, rows, col, valid, tile);
    add_lines(rotated, call.rotation + col, call.stride, call.rank, padded(valid), tile);
    drop_rows(call, mask, rows, col, valid, tile);
    store_rows(tile, rows, col, valid, y);
  }
}

void backward_block(const Matrix& dy, const ReftCall& call, const float* z, const MutableMatrix* dh,
                    const MutableMatrix* g, float* dz, float* dd, int64_t block) {
  const Rows rows = rows_of(call, block);
  const KeepMask mask(call.dropout);
  alignas(64) float tile[kRows * kColumns];
  alignas(64) float inner[kRows * kMaxRank] = {}, rotated[kRows * kMaxRank] = {};
  for (int64_t i = 0; i < rows.count; ++i)
    std::copy_n(z + (rows.first + i) * call.rank, call.rank, inner + i * kMaxRank);
  for (int64_t col = 0; col < dy.cols; col += kColumns) {
    const int64_t valid = std::min(kColumns, dy.cols - col);
    load_rows(dy, rows, col, valid, tile);
    if (g) store_list(tile, rows, col, valid, *g);
    drop_rows(call, mask, rows, col, valid, tile);
    add_dots(tile, call.rotation + col, call.stride, call.rank, padded(valid), rotated);
  }
  store_sums(rotated, call, rows, dd);
  activate(call, inner, [&](int64_t place, vr, vr slope) {
    const vr gradient = load_vr(rotated + place) * slope;
    std::memcpy(inner + place, &gradient, sizeof gradient);
  });
  store_sums(inner, call, rows, dz);
  if (!dh) return;
  for (float& value : rotated) value = -value;
  for (int64_t col = 0; col < dy.cols; col += kColumns) {
    const int64_t valid = std::min(kColumns, dy.cols - col), columns = padded(valid);
    load_rows(dy, rows, col, valid, tile);
    drop_rows(call, mask, rows, col, valid, tile);
    add_lines(inner, call.source + col, call.stride, call.rank, columns, tile);
    if (call.difference)
      add_lines(rotated, call.rotation + col, call.stride, call.rank, columns, tile);
    store_rows(tile, rows, col, valid, *dh);
  }
}

inline int team(int threads, int64_t blocks) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, blocks)));
}

}  // namespace

void reft_forward(const Matrix& h, const ReftCall& call, const MutableMatrix& y,
                  const MutableMatrix* x, float* z, float* d, int threads) {
  const int64_t blocks = (call.count + kRows - 1) / kRows;
#pragma omp parallel for num_threads(team(threads, blocks)) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) forward_block(h, call, y, x, z, d, block);
}

void reft_backward(const Matrix& dy, const ReftCall& call, const float* z, const MutableMatrix* dh,
                   const MutableMatrix* g, float* dz, float* dd, int threads) {
  const int64_t blocks = (call.count + kRows - 1) / kRows;
#pragma omp parallel for num_threads(team(threads, blocks)) schedule(static)
  for (int64_t block = 0; block < blocks; ++block)
    backward_block(dy, call, z, dh, g, dz, dd, block);
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

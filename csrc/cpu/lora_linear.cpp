#include "lora_linear.h"

#include <algorithm>

#include "tile.h"

// Floor: with R = 16 each element of x takes one 16-lane FMA, so at two FMAs a cycle a kernel here
// is bound by arithmetic, not by memory, unless x is far larger than the last-level cache. The
// tiles keep one converted, masked piece of x in the first-level cache and the sums in registers.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

constexpr int64_t kTileColumns = 256;  // of x in lora_reduce: 8 x 256 fp32 is 8 KB
constexpr int64_t kOuterRows = 64;     // tile of lora_outer: 64 x 64 fp32 is 16 KB
constexpr int64_t kOuterColumns = 64;
// Accumulators that a build holds in registers beside the operands.
#if defined(__AVX512F__)
constexpr int kRowBlock = 8;
#else
constexpr int kRowBlock = 4;
#endif

inline int team(int threads, int64_t items) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, items)));
}

// acc[i] += sum_k tile[i, k] * panel[k, 0:16], summed on its own first: one sum over all features
// would be several times less exact than a product of the vendor's.
inline void multiply_panel(const float* tile, int64_t width, const float* panel,
                           int64_t panel_stride, int64_t depth, vf* acc) {
  vf local[kRowBlock] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const vf p = load(panel + k * panel_stride);
    for (int i = 0; i < kRowBlock; ++i) local[i] += splat(tile[i * width + k]) * p;
  }
  for (int i = 0; i < kRowBlock; ++i) acc[i] += local[i];
}

template <typename E>
void reduce_rows(E element, const Matrix& x, const float* panel, int64_t rank, float scale,
                 const Dropout& dropout, float* out, int64_t block) {
  const int64_t padded = padded_rank(rank), groups = padded / kLanes;
  const int64_t row = block * kRowBlock;
  const int64_t rows = std::min<int64_t>(kRowBlock, x.rows - row);
  alignas(64) float tile[kRowBlock * kTileColumns] = {};
  vf acc[kRowBlock * 16] = {};  // ranks up to 256
  for (int64_t col = 0; col < x.cols; col += kTileColumns) {
    load_tile(element, x, dropout, row, rows, col, kTileColumns, tile);
    const int64_t depth = std::min(kTileColumns, x.cols - col);
    for (int64_t g = 0; g < groups; ++g)
      multiply_panel(tile, kTileColumns, panel + col * padded + g * kLanes, padded, depth,
                     acc + g * kRowBlock);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t r = 0; r < rank; ++r)
      out[(row + i) * rank + r] = scale * acc[r / kLanes * kRowBlock + i][r % kLanes];
}

template <typename E>
void outer_columns(E element, const Matrix& x, const float* t, int64_t rank, int64_t group,
                   const Dropout& dropout, int64_t col, float* sums) {
  const int64_t padded = padded_rank(rank);
  alignas(64) float tile[kOuterRows * kOuterColumns];
  for (int64_t i = 0; i < kOuterColumns * kLanes; ++i) sums[i] = 0.0f;
  for (int64_t row = 0; row < x.rows; row += kOuterRows) {
    const int64_t rows = std::min(kOuterRows, x.rows - row);
    load_tile(element, x, dropout, row, rows, col, kOuterColumns, tile);
    for (int64_t c = 0; c < kOuterColumns; c += kRowBlock) {
      vf acc[kRowBlock] = {};
      for (int64_t m = 0; m < rows; ++m) {
        const vf s = load(t + (row + m) * padded + group * kLanes);
        for (int i = 0; i < kRowBlock; ++i) acc[i] += splat(tile[m * kOuterColumns + c + i]) * s;
      }
      for (int i = 0; i < kRowBlock; ++i)
        store(sums + (c + i) * kLanes, load(sums + (c + i) * kLanes) + acc[i]);
    }
  }
}

// The addend's lanes from (row, col) on: fp32 or of the output's dtype.
template <typename E>
inline vf load_addend(E, const Matrix& addend, int64_t row, int64_t col) {
  const int64_t at = row * addend.stride + col;
  if (addend.dtype == DType::kFloat32) return load(static_cast<const float*>(addend.data) + at);
  return E::load(static_cast<const typename E::type*>(addend.data) + at);
}
template <typename E>
inline float load_addend_one(E, const Matrix& addend, int64_t row, int64_t col) {
  const int64_t at = row * addend.stride + col;
  if (addend.dtype == DType::kFloat32) return static_cast<const float*>(addend.data)[at];
  return E::load_one(static_cast<const typename E::type*>(addend.data) + at);
}

// One row of `width` (at most kMaskSpan) outputs, starting at column col.
template <typename E, int Vectors>
inline void expand_rows(E, const float* t, const float* panel, int64_t rank,
                        const ExpandTerms& terms, const Dropout& dropout, const MutableMatrix& out,
                        int64_t row, int64_t rows, int64_t col) {
  vf acc[4][Vectors] = {};
  for (int64_t r = 0; r < rank; ++r) {
    vf p[Vectors];
    for (int v = 0; v < Vectors; ++v) p[v] = load(panel + r * out.cols + col + v * kLanes);
    for (int64_t i = 0; i < rows; ++i) {
      const vf s = splat(t[(row + i) * rank + r]);
      for (int v = 0; v < Vectors; ++v) acc[i][v] += s * p[v];
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const uint64_t bits =
        dropout.threshold == 0
            ? ~uint64_t{0}
            : keep_bits(dropout, dropout.row_offset + static_cast<uint64_t>(row + i),
                        static_cast<uint64_t>(col / kMaskSpan * kMaskSpan)) >>
                  (col % kMaskSpan);
    auto* target = static_cast<typename E::type*>(out.data) + (row + i) * out.stride + col;
    for (int v = 0; v < Vectors; ++v) {
      vf value = keep_lanes(acc[i][v], static_cast<uint32_t>(bits >> (v * kLanes)) & 0xffffu);
      if (terms.addend) {
        vf addend = load_addend(E{}, *terms.addend, row + i, col + v * kLanes);
        if (terms.addend_scale) addend *= load(terms.addend_scale + col + v * kLanes);
        value += addend;
      }
      if (terms.bias) value += load(terms.bias + col + v * kLanes);
      E::store(target + v * kLanes, value);
    }
  }
}

template <typename E>
void expand_tail(E, const float* t, const float* panel, int64_t rank, const ExpandTerms& terms,
                 const Dropout& dropout, const MutableMatrix& out, int64_t row, int64_t col) {
  const uint64_t bits = dropout.threshold == 0
                            ? ~uint64_t{0}
                            : keep_bits(dropout, dropout.row_offset + static_cast<uint64_t>(row),
                                        static_cast<uint64_t>(col / kMaskSpan * kMaskSpan));
  for (int64_t j = col; j < out.cols; ++j) {
    float value = 0.0f;
    for (int64_t r = 0; r < rank; ++r) value += t[row * rank + r] * panel[r * out.cols + j];
    if (!(bits >> (j % kMaskSpan) & 1u)) value = 0.0f;
    if (terms.addend)
      value += load_addend_one(E{}, *terms.addend, row, j) *
               (terms.addend_scale ? terms.addend_scale[j] : 1.0f);
    if (terms.bias) value += terms.bias[j];
    E::store_one(static_cast<typename E::type*>(out.data) + row * out.stride + j, value);
  }
}

}  // namespace

void convert(const Matrix& src, const MutableMatrix& dst, int threads) {
  with_element(src.dtype, [&](auto from) {
    with_element(dst.dtype, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
#pragma omp parallel for num_threads(team(threads, src.rows* src.cols / 16384)) schedule(static)
      for (int64_t row = 0; row < src.rows; ++row) {
        const auto* in = static_cast<const typename From::type*>(src.data) + row * src.stride;
        auto* out = static_cast<typename To::type*>(dst.data) + row * dst.stride;
        const int64_t whole = src.cols / kLanes * kLanes;
        for (int64_t j = 0; j < whole; j += kLanes) To::store(out + j, From::load(in + j));
        for (int64_t j = whole; j < src.cols; ++j) To::store_one(out + j, From::load_one(in + j));
      }
    });
  });
}

void lora_reduce(const Matrix& x, const float* panel, int64_t rank, float scale,
                 const Dropout& dropout, float* out, int threads) {
  const int64_t blocks = (x.rows + kRowBlock - 1) / kRowBlock;
  with_element(x.dtype, [&](auto element) {
#pragma omp parallel for num_threads(team(threads, blocks)) schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
      reduce_rows(element, x, panel, rank, scale, dropout, out, block);
  });
}

void lora_outer(const Matrix& x, const float* t, int64_t rank, const Dropout& dropout,
                const MutableMatrix& out, bool transposed, int threads) {
  const int64_t blocks = (x.cols + kOuterColumns - 1) / kOuterColumns;
  const int64_t groups = padded_rank(rank) / kLanes;
  with_element(x.dtype, [&](auto element) {
    with_element(out.dtype, [&](auto result) {
      using Result = decltype(result);
#pragma omp parallel for num_threads(team(threads, blocks* groups)) schedule(dynamic)
      for (int64_t item = 0; item < blocks * groups; ++item) {
        const int64_t col = item / groups * kOuterColumns, group = item % groups;
        alignas(64) float sums[kOuterColumns * kLanes];
        outer_columns(element, x, t, rank, group, dropout, col, sums);
        const int64_t columns = std::min(kOuterColumns, x.cols - col);
        const int64_t first = group * kLanes, ranks = std::min(kLanes, rank - first);
        auto* data = static_cast<typename Result::type*>(out.data);
        for (int64_t c = 0; c < columns; ++c)
          for (int64_t r = 0; r < ranks; ++r) {
            const int64_t index = transposed ? (first + r) * out.stride + col + c
                                             : (col + c) * out.stride + first + r;
            Result::store_one(data + index, sums[c * kLanes + r]);
          }
      }
    });
  });
}

void drop(const Matrix& x, const Dropout& dropout, const MutableMatrix& out, int threads) {
  with_element(x.dtype, [&](auto element) {
    using E = decltype(element);
#pragma omp parallel for num_threads(team(threads, x.rows* x.cols / 4096)) schedule(static)
    for (int64_t row = 0; row < x.rows; ++row) {
      const auto* in = static_cast<const typename E::type*>(x.data) + row * x.stride;
      auto* to = static_cast<typename E::type*>(out.data) + row * out.stride;
      const uint64_t global_row = dropout.row_offset + static_cast<uint64_t>(row);
      for (int64_t span = 0; span < x.cols; span += kMaskSpan) {
        const uint64_t bits = keep_bits(dropout, global_row, static_cast<uint64_t>(span));
        const int64_t end = std::min(x.cols, span + kMaskSpan);
        for (int64_t j = span; j < end; ++j)
          to[j] = bits >> (j - span) & 1u ? in[j] : typename E::type{};
      }
    }
  });
}

void lora_expand(const float* t, const float* panel, int64_t rank, const ExpandTerms& terms,
                 const Dropout& dropout, const MutableMatrix& out, int threads) {
  constexpr int64_t kRows = 4;
  const int64_t blocks = (out.rows + kRows - 1) / kRows;
  const int64_t wide = out.cols / kMaskSpan * kMaskSpan, whole = out.cols / kLanes * kLanes;
  with_element(out.dtype, [&](auto element) {
    using E = decltype(element);
#pragma omp parallel for num_threads(team(threads, blocks)) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = block * kRows, rows = std::min(kRows, out.rows - row);
      for (int64_t col = 0; col < wide; col += kMaskSpan)
        expand_rows<E, 4>(element, t, panel, rank, terms, dropout, out, row, rows, col);
      for (int64_t col = wide; col < whole; col += kLanes)
        expand_rows<E, 1>(element, t, panel, rank, terms, dropout, out, row, rows, col);
      if (whole < out.cols)
        for (int64_t i = 0; i < rows; ++i)
          expand_tail(element, t, panel, rank, terms, dropout, out, row + i, whole);
    }
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

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
constexpr int64_t kMostOuterGroups = 4;    // sums of lora_outer: 64 x 64 fp32
constexpr int64_t kExpandRows = 4;         // outputs of lora_expand that are summed together,
constexpr int64_t kExpandTileRows = 32;    // rows that share a piece of the panel,
constexpr int64_t kPanelBytes = 16 << 10;  // which stays in the first-level cache
// Accumulators that a build holds in registers beside the operands.
#if defined(__AVX512F__)
constexpr int kRowBlock = 8;
constexpr int kExpandVectors = 4;
#else
constexpr int kRowBlock = 4;
constexpr int kExpandVectors = 1;
#endif

inline int team(int threads, int64_t items) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, items)));
}

// acc[i, :] += sum_k left[i * row_step + k * step] right[k * right_step + :], in registers.
template <int Rows, int Registers>
inline void multiply(const float* left, int64_t row_step, int64_t step, const float* right,
                     int64_t right_step, int64_t depth, vr (&acc)[Rows][Registers]) {
  for (int64_t k = 0; k < depth; ++k) {
    vr line[Registers];
    for (int v = 0; v < Registers; ++v)
      line[v] = load_vr(right + k * right_step + v * kRegisterLanes);
    for (int i = 0; i < Rows; ++i) {
      const vr factor = splat_vr(left[i * row_step + k * step]);
      for (int v = 0; v < Registers; ++v) acc[i][v] += factor * line[v];
    }
  }
}

// sums[i * sums_step + 0:16] += that product for kRowBlock rows, summed on its own first: one sum
// over all features would be several times less exact than a product of the vendor's.
inline void add_block(const float* left, int64_t row_step, int64_t step, const float* right,
                      int64_t right_step, int64_t depth, float* sums, int64_t sums_step) {
  vr acc[kRowBlock][kParts] = {};
  multiply(left, row_step, step, right, right_step, depth, acc);
  for (int i = 0; i < kRowBlock; ++i)
    for (int v = 0; v < kParts; ++v) {
      float* place = sums + i * sums_step + v * kRegisterLanes;
      const vr total = load_vr(place) + acc[i][v];
      std::memcpy(place, &total, sizeof total);
    }
}

template <typename E>
void reduce_rows(E element, const Matrix& x, const float* panel, int64_t rank, float scale,
                 const KeepMask& mask, float* out, int64_t block) {
  const int64_t padded = padded_rank(rank);
  const int64_t row = block * kRowBlock;
  const int64_t rows = std::min<int64_t>(kRowBlock, x.rows - row);
  alignas(64) float tile[kRowBlock * kTileColumns] = {};
  alignas(64) float sums[kRowBlock * kMaxRank];
  std::fill_n(sums, kRowBlock * padded, 0.0f);
  for (int64_t col = 0; col < x.cols; col += kTileColumns) {
    load_tile(element, x, mask, row, rows, col, kTileColumns, tile);
    const int64_t depth = std::min(kTileColumns, x.cols - col);
    for (int64_t first = 0; first < padded; first += kLanes)
      add_block(tile, kTileColumns, 1, panel + col * padded + first, padded, depth, sums + first,
                padded);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t r = 0; r < rank; ++r) out[(row + i) * rank + r] = scale * sums[i * padded + r];
}

// sums[c * kLanes * groups + :] of kOuterColumns columns and `groups` groups of ranks.
template <typename E>
void outer_columns(E element, const Matrix& x, const float* t, int64_t padded, int64_t first,
                   int64_t groups, const KeepMask& mask, int64_t col, float* sums) {
  const int64_t width = groups * kLanes;
  alignas(64) float tile[kOuterRows * kOuterColumns];
  std::fill_n(sums, kOuterColumns * width, 0.0f);
  for (int64_t row = 0; row < x.rows; row += kOuterRows) {
    const int64_t rows = std::min(kOuterRows, x.rows - row);
    load_tile(element, x, mask, row, rows, col, kOuterColumns, tile);
    for (int64_t g = 0; g < width; g += kLanes)
      for (int64_t c = 0; c < kOuterColumns; c += kRowBlock)
        add_block(tile + c, 1, kOuterColumns, t + row * padded + first + g, padded, rows,
                  sums + c * width + g, width);
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

// What stays of value, and what is added to it, at lanes from (row, col) on.
template <typename E>
inline void finish(E, vf value, uint64_t bits, const ExpandTerms& terms, const MutableMatrix& out,
                   int64_t row, int64_t col) {
  value = keep_lanes(value, static_cast<uint32_t>(bits) & 0xffffu);
  if (terms.addend) {
    vf addend = load_addend(E{}, *terms.addend, row, col);
    if (terms.addend_scale) addend *= load(terms.addend_scale + col);
    value += addend;
  }
  if (terms.bias) value += load(terms.bias + col);
  E::store(static_cast<typename E::type*>(out.data) + row * out.stride + col, value);
}

// Rows x (Vectors * kLanes) outputs; bits[i] are those of the span that holds them.
template <typename E, int Rows, int Vectors>
inline void expand_block(E, const float* t, const float* panel, int64_t rank,
                         const ExpandTerms& terms, const uint64_t* bits, const MutableMatrix& out,
                         int64_t row, int64_t col) {
  vr acc[Rows][Vectors * kParts] = {};
  multiply(t + row * rank, rank, 1, panel + col, out.cols, rank, acc);
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v) {
      vf value;
      std::memcpy(&value, &acc[i][v * kParts], sizeof value);
      const int64_t lanes = col + v * kLanes;
      finish(E{}, value, bits[i] >> (lanes % kMaskSpan), terms, out, row + i, lanes);
    }
}

template <typename E, int Rows>
void expand_span(E element, const float* t, const float* panel, int64_t rank,
                 const ExpandTerms& terms, const KeepMask& mask, const MutableMatrix& out,
                 int64_t row, int64_t span) {
  uint64_t bits[Rows];
  for (int i = 0; i < Rows; ++i) bits[i] = mask.span(row + i, span);
  const int64_t end = std::min(out.cols, span + kMaskSpan);
  int64_t col = span;
  for (; col + kExpandVectors * kLanes <= end; col += kExpandVectors * kLanes)
    expand_block<E, Rows, kExpandVectors>(element, t, panel, rank, terms, bits, out, row, col);
  for (; col + kLanes <= end; col += kLanes)
    expand_block<E, Rows, 1>(element, t, panel, rank, terms, bits, out, row, col);
  for (; col < end; ++col)
    for (int i = 0; i < Rows; ++i) {
      float value = 0.0f;
      for (int64_t r = 0; r < rank; ++r)
        value += t[(row + i) * rank + r] * panel[r * out.cols + col];
      if (!(bits[i] >> (col - span) & 1u)) value = 0.0f;
      if (terms.addend)
        value += load_addend_one(E{}, *terms.addend, row + i, col) *
                 (terms.addend_scale ? terms.addend_scale[col] : 1.0f);
      if (terms.bias) value += terms.bias[col];
      E::store_one(static_cast<typename E::type*>(out.data) + (row + i) * out.stride + col, value);
    }
}

// A tile of rows, piece by piece of the panel, so that each piece is read from memory once.
template <typename E>
void expand_rows(E element, const float* t, const float* panel, int64_t rank,
                 const ExpandTerms& terms, const KeepMask& mask, const MutableMatrix& out,
                 int64_t first, int64_t last) {
  const int64_t fitting = kPanelBytes / (4 * std::max<int64_t>(rank, 1)) / kMaskSpan * kMaskSpan;
  const int64_t piece = std::max(fitting, kMaskSpan);
  for (int64_t start = 0; start < out.cols; start += piece) {
    const int64_t end = std::min(out.cols, start + piece);
    int64_t row = first;
    for (; row + kExpandRows <= last; row += kExpandRows)
      for (int64_t span = start; span < end; span += kMaskSpan)
        expand_span<E, kExpandRows>(element, t, panel, rank, terms, mask, out, row, span);
    for (; row < last; ++row)
      for (int64_t span = start; span < end; span += kMaskSpan)
        expand_span<E, 1>(element, t, panel, rank, terms, mask, out, row, span);
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

void transpose(const Matrix& src, float* dst, int64_t stride, int threads) {
  const int64_t bands = (stride + kLanes - 1) / kLanes, blocks = (src.cols + kLanes - 1) / kLanes;
  with_element(src.dtype, [&](auto element) {
    using E = decltype(element);
#pragma omp parallel for num_threads(team(threads, src.cols* stride / 16384)) schedule(static)
    for (int64_t item = 0; item < bands * blocks; ++item) {
      const int64_t top = item / blocks * kLanes, left = item % blocks * kLanes;
      const int64_t rows = std::min<int64_t>(kLanes, src.rows - top);
      const int64_t cols = std::min<int64_t>(kLanes, src.cols - left);
      const int64_t width = std::min<int64_t>(kLanes, stride - top);
      alignas(64) float block[kLanes][kLanes] = {};
      for (int64_t r = 0; r < rows; ++r) {
        const auto* in =
            static_cast<const typename E::type*>(src.data) + (top + r) * src.stride + left;
        if (cols == kLanes)
          store(block[r], E::load(in));
        else
          for (int64_t c = 0; c < cols; ++c) block[r][c] = E::load_one(in + c);
      }
      for (int64_t c = 0; c < cols; ++c) {
        float* out = dst + (left + c) * stride + top;
        for (int64_t r = 0; r < width; ++r) out[r] = block[r][c];
      }
    }
  });
}

void lora_reduce(const Matrix& x, const float* panel, int64_t rank, float scale,
                 const Dropout& dropout, float* out, int threads) {
  const int64_t blocks = (x.rows + kRowBlock - 1) / kRowBlock;
  const KeepMask mask(dropout);
  with_element(x.dtype, [&](auto element) {
#pragma omp parallel for num_threads(team(threads, blocks)) schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
      reduce_rows(element, x, panel, rank, scale, mask, out, block);
  });
}

void lora_outer(const Matrix& x, const float* t, int64_t rank, const Dropout& dropout,
                const MutableMatrix& out, bool transposed, int threads) {
  const int64_t blocks = (x.cols + kOuterColumns - 1) / kOuterColumns;
  const int64_t padded = padded_rank(rank), groups = padded / kLanes;
  const int64_t parts = (groups + kMostOuterGroups - 1) / kMostOuterGroups;
  const KeepMask mask(dropout);
  with_element(x.dtype, [&](auto element) {
    with_element(out.dtype, [&](auto result) {
      using Result = decltype(result);
#pragma omp parallel for num_threads(team(threads, blocks* parts)) schedule(dynamic)
      for (int64_t item = 0; item < blocks * parts; ++item) {
        const int64_t col = item / parts * kOuterColumns;
        const int64_t group = item % parts * kMostOuterGroups, first = group * kLanes;
        const int64_t own = std::min(kMostOuterGroups, groups - group), width = own * kLanes;
        alignas(64) float sums[kOuterColumns * kMostOuterGroups * kLanes];
        outer_columns(element, x, t, padded, first, own, mask, col, sums);
        const int64_t columns = std::min(kOuterColumns, x.cols - col);
        const int64_t ranks = std::min(width, rank - first);
        auto* data = static_cast<typename Result::type*>(out.data);
        for (int64_t c = 0; c < columns; ++c)
          for (int64_t r = 0; r < ranks; ++r) {
            const int64_t index = transposed ? (first + r) * out.stride + col + c
                                             : (col + c) * out.stride + first + r;
            Result::store_one(data + index, sums[c * width + r]);
          }
      }
    });
  });
}

void draw(const Dropout& dropout, int64_t rows, int64_t cols, uint64_t* bits, int threads) {
  const int64_t spans = (cols + kMaskSpan - 1) / kMaskSpan;
  const KeepMask mask(dropout);
#pragma omp parallel for num_threads(team(threads, rows* cols / 4096)) schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t span = 0; span < spans; ++span)
      bits[row * spans + span] = mask.span(row, span * kMaskSpan);
}

void drop(const Matrix& x, const Dropout& dropout, const MutableMatrix& out, int threads) {
  const KeepMask mask(dropout);
  with_element(x.dtype, [&](auto element) {
    using E = decltype(element);
#pragma omp parallel for num_threads(team(threads, x.rows* x.cols / 4096)) schedule(static)
    for (int64_t row = 0; row < x.rows; ++row) {
      const auto* in = static_cast<const typename E::type*>(x.data) + row * x.stride;
      auto* to = static_cast<typename E::type*>(out.data) + row * out.stride;
      for (int64_t span = 0; span < x.cols; span += kMaskSpan) {
        const uint64_t bits = mask.span(row, span);
        const int64_t end = std::min(x.cols, span + kMaskSpan);
        for (int64_t j = span; j < end; ++j)
          to[j] = bits >> (j - span) & 1u ? in[j] : typename E::type{};
      }
    }
  });
}

void lora_expand(const float* t, const float* panel, int64_t rank, const ExpandTerms& terms,
                 const Dropout& dropout, const MutableMatrix& out, int threads) {
  // A whole tile a thread where there are enough, else whole blocks of rows.
  const int64_t share = (out.rows + std::max(threads, 1) - 1) / std::max(threads, 1);
  const int64_t rows =
      std::min(kExpandTileRows, (share + kExpandRows - 1) / kExpandRows * kExpandRows);
  const int64_t tiles = rows ? (out.rows + rows - 1) / rows : 0;
  const KeepMask mask(dropout);
  with_element(out.dtype, [&](auto element) {
#pragma omp parallel for num_threads(team(threads, tiles)) schedule(static)
    for (int64_t tile = 0; tile < tiles; ++tile)
      expand_rows(element, t, panel, rank, terms, mask, out, tile * rows,
                  std::min(out.rows, (tile + 1) * rows));
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

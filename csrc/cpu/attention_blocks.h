// What forward and backward of attention share: blocks in fp32, which scores of a block exist, and
// the scores themselves.
#pragma once

#include <cstring>

#include "attention_tiles.h"
#include "transpose.h"

namespace fasttune::cpu::FASTTUNE_ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr vi kLaneIndex = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline bool any(vi condition) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= condition[i];
  return bits != 0;
#endif
}

// out[i, 0:padded width] = scale * in[i, 0:width], zero beyond the width and beyond `rows`.
inline void load_rows(DType dtype, const void* data, int64_t row_stride, int64_t rows,
                      int64_t block_rows, int64_t width, float scale, float* out,
                      int64_t out_stride) {
  const int64_t whole = width / kLanes * kLanes, padded = padded_rank(width);
  with_element(dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t i = 0; i < rows; ++i) {
      const auto* in = static_cast<const typename E::type*>(data) + i * row_stride;
      float* target = out + i * out_stride;
      for (int64_t j = 0; j < whole; j += kLanes) store(target + j, E::load(in + j));
      for (int64_t j = whole; j < padded; ++j) target[j] = j < width ? E::load_one(in + j) : 0.0f;
      if (scale != 1.0f)
        for (int64_t j = 0; j < padded; j += kRegisterLanes)
          store(target + j, load_vr(target + j) * splat_vr(scale));
    }
  });
  for (int64_t i = rows; i < block_rows; ++i) std::fill_n(out + i * out_stride, padded, 0.0f);
}

// out[i, 0:width] = scale(i) * in[i, 0:width], rounded to nearest even.
template <typename Scale>
inline void store_rows(DType dtype, const float* in, int64_t in_stride, int64_t rows, int64_t width,
                       Scale&& scale, void* data, int64_t row_stride) {
  const int64_t whole = width / kLanes * kLanes;
  with_element(dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t i = 0; i < rows; ++i) {
      const float* source = in + i * in_stride;
      const float factor = scale(i);
      auto* out = static_cast<typename E::type*>(data) + i * row_stride;
      for (int64_t j = 0; j < whole; j += kLanes)
        E::store(out + j, load(source + j) * splat(factor));
      for (int64_t j = whole; j < width; ++j) E::store_one(out + j, source[j] * factor);
    }
  });
}

inline int64_t offset_of(const Heads& x, int64_t batch, int64_t head, int64_t row) {
  return batch * x.batch_stride + head * x.head_stride + row * x.row_stride;
}
inline int64_t offset_of(const MutableHeads& x, int64_t batch, int64_t head, int64_t row) {
  return batch * x.batch_stride + head * x.head_stride + row * x.row_stride;
}
inline const void* at(const Heads& x, DType dtype, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const char*>(x.data) + offset_of(x, batch, head, row) * size_of(dtype);
}
inline void* at(const MutableHeads& x, DType dtype, int64_t batch, int64_t head, int64_t row) {
  return static_cast<char*>(x.data) + offset_of(x, batch, head, row) * size_of(dtype);
}

// out [width, kBlockKeys] = the transpose of in [kBlockKeys, in_stride].
inline void transpose_keys(const float* in, int64_t in_stride, int64_t width, float* out) {
  for (int64_t j = 0; j < width; j += kLanes)
    for (int64_t i = 0; i < kBlockKeys; i += kLanes)
      transpose_16(in + i * in_stride + j, in_stride, out + j * kBlockKeys + i, kBlockKeys);
}

// Which scores of a block exist: the first `of_row` ones of each row, those at or beyond it are
// masked; where `biased`, every score up to there takes the bias, which may be -infinity.
struct Limits {
  int64_t columns;  // of the widest row; 0: the block is masked as a whole
  int32_t
      of_row[kBlockRows];  // rows beyond the matrix: the last one's to the end of its strip, then 0
  int32_t widest[kStrips], narrowest[kStrips];  // of the rows of a strip
  bool biased;
};

inline void finish_limits(Limits& limits) {
  limits.columns = 0;
  for (int64_t strip = 0; strip < kStrips; ++strip) {
    const int32_t* first = limits.of_row + strip * kTileRows;
    limits.widest[strip] = *std::max_element(first, first + kTileRows);
    limits.narrowest[strip] = *std::min_element(first, first + kTileRows);
    limits.columns = std::max<int64_t>(limits.columns, limits.widest[strip]);
  }
}

// Bias of a boolean mask, one byte an element.
struct BoolElement {
  using type = uint8_t;
  static vf load(const uint8_t* p) {
    typedef uint8_t bytes __attribute__((vector_size(16)));
    bytes b;
    std::memcpy(&b, p, sizeof b);
    return select(__builtin_convertvector(b, vi) != 0, splat(0.0f), splat(-kInfinity));
  }
  static float load_one(const uint8_t* p) { return *p ? 0.0f : -kInfinity; }
};

// Fills the bias of `rows` x `columns` scores from the mask at `data`, and the limits.
template <typename E>
inline void read_mask(E, const AttentionMask& mask, int64_t offset, int64_t rows, int64_t columns,
                      float* bias, Limits& limits) {
  const auto* data = static_cast<const typename E::type*>(mask.data) + offset;
  vi shifted = {};  // lanes with a bias other than 0
  for (int64_t i = 0; i < rows; ++i) {
    const auto* row = data + i * mask.row_stride;
    limits.of_row[i] = 0;
    for (int64_t j = 0; j < columns; j += kLanes) {
      vf value = splat(-kInfinity);
      const int64_t lanes = std::min(kLanes, columns - j);
      if (mask.key_stride == 1 && lanes == kLanes)
        value = E::load(row + j);
      else
        for (int64_t k = 0; k < lanes; ++k) value[k] = E::load_one(row + (j + k) * mask.key_stride);
      store(bias + i * kBlockKeys + j, value);
      const vi inside = kLaneIndex < static_cast<int32_t>(lanes);
      shifted |= inside & (value != splat(0.0f));
      if (any(value != splat(-kInfinity)))
        limits.of_row[i] = static_cast<int32_t>(std::min(j + kLanes, columns));
    }
  }
  limits.biased = any(shifted);
}

// A boolean mask, one byte an element, whose rows all are some kept keys and then none, no fewer
// than the row before, as padding and a causal order leave them: the limits alone say that. False
// of any other.
inline bool read_prefixes(const AttentionMask& mask, int64_t offset, int64_t rows, int64_t columns,
                          Limits& limits) {
  if (mask.key_stride != 1) return false;
  const auto* data = static_cast<const uint8_t*>(mask.data) + offset;
  for (int64_t i = 0; i < rows; ++i) {
    const uint8_t* row = data + i * mask.row_stride;
    const void* end = std::memchr(row, 0, columns);
    const int64_t kept = end ? static_cast<const uint8_t*>(end) - row : columns;
    if (i > 0 && kept < limits.of_row[i - 1]) return false;  // a gap for the sums over rows
    limits.of_row[i] = static_cast<int32_t>(kept);
    uint64_t later = 0;
    int64_t j = kept;
    for (; j + 8 <= columns; j += 8) {
      uint64_t eight;
      std::memcpy(&eight, row + j, sizeof eight);
      later |= eight;
    }
    for (; j < columns; ++j) later |= row[j];
    if (later != 0) return false;
  }
  return true;
}

// The limits of the block of scores at (row, key); rows and keys count what the matrix has there.
inline void set_limits(const AttentionInputs& inputs, int64_t batch, int64_t head, int64_t row,
                       int64_t key, float* bias, Limits& limits) {
  const AttentionShape& shape = inputs.shape;
  const AttentionMask& mask = inputs.mask;
  const int64_t rows = std::min(kBlockRows, shape.queries - row);
  const int64_t columns = std::min(kBlockKeys, shape.keys - key);
  limits.biased = false;
  if (mask.kind == MaskKind::kNone) {
    for (int64_t i = 0; i < rows; ++i)
      limits.of_row[i] = static_cast<int32_t>(
          shape.causal ? std::max<int64_t>(0, std::min(columns, row + i + 1 - key)) : columns);
  } else {
    const int64_t offset = batch * mask.batch_stride + head * mask.head_stride +
                           row * mask.row_stride + key * mask.key_stride;
    const bool bools = mask.kind == MaskKind::kBool;
    if (!bools)
      with_element(mask.dtype, [&](auto element) {
        read_mask(element, mask, offset, rows, columns, bias, limits);
      });
    else if (!read_prefixes(mask, offset, rows, columns, limits))
      read_mask(BoolElement{}, mask, offset, rows, columns, bias, limits);
    if (limits.biased)
      for (int64_t i = rows; i < kBlockRows; ++i)
        std::fill_n(bias + i * kBlockKeys, kBlockKeys, 0.0f);
  }
  const int64_t whole_strips = divide_up(rows, kTileRows) * kTileRows;
  for (int64_t i = rows; i < kBlockRows; ++i)
    limits.of_row[i] = i < whole_strips ? limits.of_row[rows - 1] : 0;
  finish_limits(limits);
}

// How scores and their gradients are formed: q k^T and dout v^T, products of inputs as they came.
// In fp32, with the scale in the queries:
struct Fp32Products {
  using Left = Rows;
  static constexpr bool kPairs = false;
  static int64_t depth(int64_t width) { return width; }
  // The left operand [kBlockRows, stride].
  static void load_left(DType dtype, const void* data, int64_t row_stride, int64_t rows,
                        int64_t width, float scale, float* out, int64_t stride) {
    load_rows(dtype, data, row_stride, rows, kBlockRows, width, scale, out, stride);
  }
  // The right operand [width, kBlockKeys], through a buffer [kBlockKeys, stride].
  static void load_right(DType dtype, const void* data, int64_t row_stride, int64_t rows,
                         int64_t width, float* buffer, int64_t stride, float* out) {
    load_rows(dtype, data, row_stride, rows, kBlockKeys, width, 1.0f, buffer, stride);
    transpose_keys(buffer, stride, padded_rank(width), out);
  }
};

#if defined(__AVX512BF16__)
// In pairs of bf16, which the dot product multiplies exactly, at twice the rate; the scale comes
// after.
struct Bf16Products {
  using Left = PairRows;
  static constexpr bool kPairs = true;
  static int64_t depth(int64_t width) { return divide_up(width, 2); }
  static void load_left(DType, const void* data, int64_t row_stride, int64_t rows, int64_t width,
                        float, float* out, int64_t stride) {
    load_pairs(data, row_stride, rows, kBlockRows, width, out, stride);
  }
  static void load_right(DType, const void* data, int64_t row_stride, int64_t rows, int64_t width,
                         float* buffer, int64_t stride, float* out) {
    load_pairs(data, row_stride, rows, kBlockKeys, width, buffer, stride);
    transpose_keys(buffer, stride, padded_rank(depth(width)), out);
  }

 private:
  static void load_pairs(const void* data, int64_t row_stride, int64_t rows, int64_t block_rows,
                         int64_t width, float* out, int64_t stride) {
    const int64_t padded = 2 * padded_rank(depth(width));
    for (int64_t i = 0; i < block_rows; ++i) {
      auto* target = reinterpret_cast<uint16_t*>(out + i * stride);
      int64_t j = 0;
      if (i < rows) {
        const auto* in = static_cast<const uint16_t*>(data) + i * row_stride;
        for (; j + kLanes <= width; j += kLanes)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + j),
                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + j)));
        for (; j < width; ++j) target[j] = in[j];
      }
      for (; j < padded; ++j) target[j] = 0;
    }
  }
};
#endif

// Calls body(Products{}) for the run-time dtype.
template <typename Body>
inline void with_products(DType dtype, Body&& body) {
#if defined(__AVX512BF16__)
  if (dtype == DType::kBFloat16) return body(Bf16Products{});
#endif
  return body(Fp32Products{});
}

// finish(row, column, product, exact) for each register of left right_t that holds a score: left
// [kBlockRows, depth], right_t [depth, kBlockKeys]. exact: every lane lies within the limits.
template <typename Left, typename Finish>
inline void score_tiles(Left left, const float* right_t, int64_t depth, const Limits& limits,
                        Finish&& finish) {
  constexpr int64_t kWide = kTileVectors * kLanes;
  const auto one = [&](auto vectors, int64_t strip, int64_t column) {
    constexpr int kVectors = decltype(vectors)::value;
    const auto run = [&](auto exact) {
      tile<kVectors>(left.from(strip * kTileRows), right_t + column, kBlockKeys, depth,
                     [&](int64_t i, int64_t j, vr value) {
                       finish(strip * kTileRows + i, column + j, value, exact);
                     });
    };
    if (limits.narrowest[strip] >= column + kVectors * kLanes)
      run(std::true_type{});
    else
      run(std::false_type{});
  };
  for (int64_t column = 0; column < limits.columns; column += kWide)
    for (int64_t strip = 0; strip < kStrips; ++strip) {
      const int64_t left_over = limits.widest[strip] - column;
      if (left_over > kWide - kLanes)
        one(std::integral_constant<int, kTileVectors>{}, strip, column);
      else if (left_over > 0)
        one(std::integral_constant<int, 1>{}, strip, column);
    }
}

// value where the lane's column is below the row's limit, else `other`.
inline vr within(const Limits& limits, int64_t row, int64_t column, vr value, float other) {
  vri lane;
  std::memcpy(&lane, &kLaneIndex, sizeof lane);
  return select(lane < limits.of_row[row] - static_cast<int32_t>(column), value, splat_vr(other));
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

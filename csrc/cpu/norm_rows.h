// What rms_norm, layer_norm and ia3_scale share: vectors of a run-time dtype, the partial vector at
// the end of a row, sums over a row in one fixed order, column sums over all rows.
#pragma once

#include <algorithm>
#include <array>

#include "register.h"

namespace fasttune::cpu::FASTTUNE_ISA {

constexpr int64_t kNormRows = 4;     // rows that share a load of the weight
constexpr int64_t kShortRow = 1024;  // above, four rows crowd out the first-level cache
constexpr int64_t kGrain = 16384;    // elements that are worth a thread
constexpr int64_t kSumSteps = 32;    // additions in a row before the total: little rounding
constexpr int kSumChains = 4;        // independent sums hide the latency of an addition

inline vr all(float value) { return value - (vr){}; }

// Which lanes of a vector exist: all of them, or the first n at the end of a row.
struct Whole {};
struct Part {
  int64_t n;
};

using Float = Element<DType::kFloat32>;

// Calls body(j, Whole or Part) for each vector of a row.
template <typename Body>
inline void for_columns(int64_t cols, Body&& body) {
  const int64_t whole = cols / kRegisterLanes * kRegisterLanes;
  for (int64_t j = 0; j < whole; j += kRegisterLanes) body(j, Whole{});
  if (whole < cols) body(whole, Part{cols - whole});
}

template <typename E>
inline vr load_lanes(E, const typename E::type* p, Whole) {
  return Register<E>::load(p);
}
template <typename E>
inline vr load_lanes(E, const typename E::type* p, Part part) {
  typename E::type lanes[kRegisterLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(part.n) * sizeof *p);
  return Register<E>::load(lanes);
}

template <typename E>
inline void store_lanes(E, typename E::type* p, vr v, Whole) {
  Register<E>::store(p, v);
}
template <typename E>
inline void store_lanes(E, typename E::type* p, vr v, Part part) {
  typename E::type lanes[kRegisterLanes];
  Register<E>::store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(part.n) * sizeof *p);
}

// v with the lanes that do not exist set to zero.
inline vr existing(vr v, Whole) { return v; }
inline vr existing(vr v, Part part) {
  for (int64_t i = part.n; i < kRegisterLanes; ++i) v[i] = 0.0f;
  return v;
}

// A vector of any dtype in fp32, converted into `buffer` unless it is fp32 already; the kernels
// then need no instance per dtype of the parameters.
inline const float* widened(const void* data, DType dtype, float offset, float* buffer,
                            int64_t cols) {
  if (dtype == DType::kFloat32 && offset == 0.0f) return static_cast<const float*>(data);
  with_element(dtype, [&](auto element) {
    const auto* values = static_cast<const typename decltype(element)::type*>(data);
    for_columns(cols, [&](int64_t j, auto lanes) {
      const vr v = load_lanes(element, values + j, lanes) + all(offset);
      store_lanes(Float{}, buffer + j, v, lanes);
    });
  });
  return buffer;
}

// offset + vector, or `absent` everywhere if there is none.
inline const float* values_of(const NormVector& vector, int64_t cols, float absent) {
  if (vector.data) return widened(vector.data, vector.dtype, vector.offset, vector.buffer, cols);
  std::fill(vector.buffer, vector.buffer + cols, absent);
  return vector.buffer;
}

// v rounded to the dtype of E and back.
inline vr rounded(Float, vr v) { return v; }
inline vr rounded(Element<DType::kBFloat16>, vr v) {
  ru bits = (ru)v;
  bits += 0x7fffu + ((bits >> 16) & 1u);
  bits &= 0xffff0000u;
  return v == v ? (vr)bits : v;
}
inline vr rounded(Element<DType::kFloat16>, vr v) {
  using Half = Register<Element<DType::kFloat16>>;
  uint16_t lanes[kRegisterLanes];
  Half::store(lanes, v);
  return Half::load(lanes);
}

template <int N>
struct Lanes {
  typedef float type __attribute__((vector_size(4 * N)));
};

// The sum of N lanes: halves are added until one value is left.
template <int N>
inline float tree_sum(typename Lanes<N>::type v) {
  if constexpr (N == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    typename Lanes<N / 2>::type half[2];
    std::memcpy(half, &v, sizeof v);
    return tree_sum<N / 2>(half[0] + half[1]);
  }
}
#if defined(__AVX512F__)
template <>
inline float tree_sum<16>(vr v) {
  return _mm512_reduce_add_ps((__m512)v);
}
#endif

// N sums over a row at once: term(j, Whole or Part, sums) adds the terms of a vector, zero in lanes
// that do not exist. The order depends on the length of the row only.
template <int N, typename Term>
inline std::array<float, N> sum_columns(int64_t cols, Term&& term) {
  constexpr int64_t kStep = kSumChains * kRegisterLanes;
  vr total[N] = {};
  const int64_t stepped = cols / kStep * kStep, whole = cols / kRegisterLanes * kRegisterLanes;
  for (int64_t first = 0; first < stepped; first += kSumSteps * kStep) {
    vr chain[kSumChains][N] = {};
    const int64_t end = std::min(first + kSumSteps * kStep, stepped);
    for (int64_t j = first; j < end; j += kStep)
      for (int c = 0; c < kSumChains; ++c) term(j + c * kRegisterLanes, Whole{}, chain[c]);
    static_assert(kSumChains == 4);
    for (int n = 0; n < N; ++n)
      total[n] += (chain[0][n] + chain[1][n]) + (chain[2][n] + chain[3][n]);
  }
  for (int64_t j = stepped; j < whole; j += kRegisterLanes) term(j, Whole{}, total);
  if (whole < cols) term(whole, Part{cols - whole}, total);
  std::array<float, N> sums;
  for (int n = 0; n < N; ++n) sums[n] = tree_sum<kRegisterLanes>(total[n]);
  return sums;
}

// 1 / sqrt(v), rounded once: one number a row may be computed in double.
inline float reciprocal_root(double v) { return static_cast<float>(1.0 / std::sqrt(v)); }

// sum = x + residual for one row, rounded to the dtype of x.
template <typename E>
inline void add_row(E element, const typename E::type* x, const Matrix& residual, int64_t row,
                    typename E::type* sum) {
  with_element(residual.dtype, [&](auto other) {
    const auto* r =
        static_cast<const typename decltype(other)::type*>(residual.data) + row * residual.stride;
    for_columns(residual.cols, [&](int64_t j, auto lanes) {
      const vr s = load_lanes(element, x + j, lanes) + load_lanes(other, r + j, lanes);
      store_lanes(element, sum + j, s, lanes);
    });
  });
}

inline int norm_team(int threads, int64_t rows, int64_t cols) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, rows * cols / kGrain)));
}

// Calls body.rows<kNormRows>(row) or body.rows<1>(row) so that every row in [begin, end) is covered
// once, in order.
template <typename Body>
inline void for_row_blocks(int64_t begin, int64_t end, int64_t cols, Body& body) {
  int64_t row = begin;
  if (cols <= kShortRow)
    for (; row + kNormRows <= end; row += kNormRows) body.template rows<kNormRows>(row);
  for (; row < end; ++row) body.template rows<1>(row);
}

// out[j] = partial[0, j] + partial[1, j] + ...
inline void add_partials(const ColumnSums& sums, int64_t cols, int threads) {
  if (!sums.out) return;
  constexpr int64_t kColumns = 256;
  const int64_t blocks = (cols + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(norm_team(threads, sums.chunks, cols)) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kColumns, end = std::min(begin + kColumns, cols);
    std::fill(sums.out + begin, sums.out + end, 0.0f);
    for (int64_t chunk = 0; chunk < sums.chunks; ++chunk)
      for (int64_t j = begin; j < end; ++j) sums.out[j] += sums.partial[chunk * cols + j];
  }
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

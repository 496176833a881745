#include "scaled_sum.h"

#include <algorithm>

#include "keep_mask.h"
#include "staging.h"

// Floor per element in 16 bits: 2 bytes of x and of the addend read and 2 written, against three
// operations and a mask of about 10: memory binds.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

inline const char* at(const Matrix& x, int64_t row, int64_t col) {
  return static_cast<const char*>(x.data) + (row * x.stride + col) * size_of(x.dtype);
}

// A whole span of operands of one dtype.
template <typename E>
void run_whole_span(E, const Matrix& x, const Matrix* addend, const float* column_scale,
                    float scale, const KeepMask& mask, const MutableMatrix& out, int64_t row,
                    int64_t col) {
  using T = typename E::type;
  const T* in = static_cast<const T*>(x.data) + row * x.stride + col;
  const T* other =
      addend ? static_cast<const T*>(addend->data) + row * addend->stride + col : nullptr;
  T* to = static_cast<T*>(out.data) + row * out.stride + col;
  const uint64_t bits = mask.span(row, col);
  for (int64_t j = 0; j < kMaskSpan; j += kLanes) {
    vf value = E::load(in + j) * scale;
    if (column_scale) value *= load(column_scale + col + j);
    value = keep_lanes(value, static_cast<uint32_t>(bits >> j) & 0xffffu);
    E::store(to + j, other ? E::load(other + j) + value : value);
  }
}

// `count` elements, at most kMaskSpan, of a row from column `col`, a multiple of kMaskSpan.
void run_span(const Matrix& x, const Matrix* addend, const float* column_scale, float scale,
              const KeepMask& mask, const MutableMatrix& out, int64_t row, int64_t col,
              int64_t count) {
  alignas(64) float value[kMaskSpan] = {}, other[kMaskSpan] = {}, columns[kMaskSpan] = {};
  widen(at(x, row, col), x.dtype, count, value);
  if (addend) widen(at(*addend, row, col), addend->dtype, count, other);
  if (column_scale) std::copy_n(column_scale + col, count, columns);
  const uint64_t bits = mask.span(row, col);
  for (int64_t j = 0; j < kMaskSpan; j += kLanes) {
    vf factor = splat(scale);
    if (column_scale) factor *= load(columns + j);
    const vf kept =
        keep_lanes(load(value + j) * factor, static_cast<uint32_t>(bits >> j) & 0xffffu);
    store(value + j, load(other + j) + kept);
  }
  narrow(value, count, out.dtype,
         static_cast<char*>(out.data) + (row * out.stride + col) * size_of(out.dtype));
}

}  // namespace

void scaled_sum(const Matrix& x, const Matrix* addend, const float* column_scale, float scale,
                const Dropout& dropout, const MutableMatrix& out, int threads) {
  const int64_t wanted = std::min<int64_t>({threads, x.rows, x.rows * x.cols / 8192});
  const bool one_dtype = x.dtype == out.dtype && (!addend || addend->dtype == x.dtype);
  const KeepMask mask(dropout);
  const int64_t whole = one_dtype ? x.cols / kMaskSpan * kMaskSpan : 0;
  with_element(x.dtype, [&](auto element) {
#pragma omp parallel for num_threads(static_cast<int>(std::max<int64_t>(1, wanted))) \
    schedule(static)
    for (int64_t row = 0; row < x.rows; ++row) {
      for (int64_t col = 0; col < whole; col += kMaskSpan)
        run_whole_span(element, x, addend, column_scale, scale, mask, out, row, col);
      for (int64_t col = whole; col < x.cols; col += kMaskSpan)
        run_span(x, addend, column_scale, scale, mask, out, row, col,
                 std::min(kMaskSpan, x.cols - col));
    }
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

#include "rope.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

// Floor: x is read and y is written once, 2 D elements a row; two multiply-adds for every element
// that rotates. The cosines and sines of a position are shared by its heads. So it is bound by
// memory, and rows are walked in the order in which y lies in memory.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

constexpr int64_t kBlockElements = 8192;  // of x, the unit of work of a thread

typedef uint64_t vl __attribute__((vector_size(64)));

// (v1, v0, v3, v2, ...). Shifts of whole pairs: every build has them, a shuffle of a vector that is
// wider than a register falls apart into single elements.
inline vf swap_neighbours(vf v) {
  const vl pairs = (vl)v;
  return (vf)(pairs << 32 | pairs >> 32);
}

// y_i = x_i cos_i - x_j sin_i and y_j = x_j cos_j + x_i sin_j; transposed, sin_i is -sin_j and
// sin_j is -sin_i. T is float or vf.
template <bool Transposed, typename T>
inline void rotate(T& xi, T& xj, T cos_i, T cos_j, T sin_i, T sin_j) {
  const T to_i = Transposed ? -sin_j : sin_i, to_j = Transposed ? -sin_i : sin_j;
  const T yi = xi * cos_i - xj * to_i;
  xj = xj * cos_j + xi * to_j;
  xi = yi;
}

template <bool Transposed, typename E, typename C>
inline void rotate_pair(const typename E::type* x, typename E::type* y, const typename C::type* cos,
                        const typename C::type* sin, int64_t i, int64_t j) {
  float xi = E::load_one(x + i), xj = E::load_one(x + j);
  rotate<Transposed>(xi, xj, C::load_one(cos + i), C::load_one(cos + j), C::load_one(sin + i),
                     C::load_one(sin + j));
  E::store_one(y + i, xi);
  E::store_one(y + j, xj);
}

// Sixteen elements from element i on. The last vector of a row may overlap the one before it, which
// writes the same values twice: x and y are different memory.
inline int64_t vector_start(int64_t i, int64_t end) { return std::min(i, end - kLanes); }

template <bool Transposed, typename E, typename C>
inline void rotate_halves(const typename E::type* x, typename E::type* y,
                          const typename C::type* cos, const typename C::type* sin,
                          int64_t rotary) {
  const int64_t half = rotary / 2;
  if (half < kLanes) {
    for (int64_t i = 0; i < half; ++i) rotate_pair<Transposed, E, C>(x, y, cos, sin, i, i + half);
    return;
  }
  for (int64_t next = 0; next < half; next += kLanes) {
    const int64_t i = vector_start(next, half), j = i + half;
    vf xi = E::load(x + i), xj = E::load(x + j);
    rotate<Transposed>(xi, xj, C::load(cos + i), C::load(cos + j), C::load(sin + i),
                       C::load(sin + j));
    E::store(y + i, xi);
    E::store(y + j, xj);
  }
}

template <bool Transposed, typename E, typename C>
inline void rotate_neighbours(const typename E::type* x, typename E::type* y,
                              const typename C::type* cos, const typename C::type* sin,
                              int64_t rotary) {
  if (rotary < kLanes) {
    for (int64_t i = 0; i < rotary; i += 2) rotate_pair<Transposed, E, C>(x, y, cos, sin, i, i + 1);
    return;
  }
  constexpr vf sign = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
  for (int64_t next = 0; next < rotary; next += kLanes) {
    const int64_t i = vector_start(next, rotary);
    const vf v = E::load(x + i);
    const vf signed_sin = C::load(sin + i) * sign;
    const vf weight = Transposed ? swap_neighbours(signed_sin) : signed_sin;
    E::store(y + i, v * C::load(cos + i) + swap_neighbours(v) * weight);
  }
}

// Rows [first, last) of one operand, counted in the order of y's memory.
template <bool Interleaved, bool Transposed, typename E, typename C>
void rotate_rows(const RopeOperand& operand, const RopeTables& tables, const RopeShape& shape,
                 int64_t first, int64_t last) {
  using X = typename E::type;
  using Angle = typename C::type;
  const bool heads_inside = operand.y_head <= operand.y_position;
  const int64_t inside = heads_inside ? operand.heads : shape.positions;
  const int64_t outside = heads_inside ? shape.positions : operand.heads;
  const size_t rest_bytes = static_cast<size_t>(shape.features - shape.rotary) * sizeof(X);
  for (int64_t row = first; row < last;) {
    const int64_t outer = row / inside % outside, b = row / inside / outside;
    const int64_t start = row % inside, end = std::min(inside, start + last - row);
    for (int64_t inner = start; inner < end; ++inner) {
      const int64_t h = heads_inside ? inner : outer, s = heads_inside ? outer : inner;
      const X* x = static_cast<const X*>(operand.x) + b * operand.x_batch + h * operand.x_head +
                   s * operand.x_position;
      X* y = static_cast<X*>(operand.y) + b * operand.y_batch + h * operand.y_head +
             s * operand.y_position;
      const Angle* cos =
          static_cast<const Angle*>(tables.cos) + b * tables.cos_batch + s * tables.cos_position;
      const Angle* sin =
          static_cast<const Angle*>(tables.sin) + b * tables.sin_batch + s * tables.sin_position;
      if (Interleaved)
        rotate_neighbours<Transposed, E, C>(x, y, cos, sin, shape.rotary);
      else
        rotate_halves<Transposed, E, C>(x, y, cos, sin, shape.rotary);
      if (rest_bytes) std::memcpy(y + shape.rotary, x + shape.rotary, rest_bytes);
    }
    row += end - start;
  }
}

void rotate_block(const RopeOperand& operand, const RopeTables& tables, const RopeShape& shape,
                  int64_t first, int64_t last) {
  with_element(operand.dtype, [&](auto element) {
    with_element(tables.dtype, [&](auto angle) {
      using E = decltype(element);
      using C = decltype(angle);
      if (shape.interleaved && shape.transposed)
        rotate_rows<true, true, E, C>(operand, tables, shape, first, last);
      else if (shape.interleaved)
        rotate_rows<true, false, E, C>(operand, tables, shape, first, last);
      else if (shape.transposed)
        rotate_rows<false, true, E, C>(operand, tables, shape, first, last);
      else
        rotate_rows<false, false, E, C>(operand, tables, shape, first, last);
    });
  });
}

}  // namespace

void rope(const RopeOperand* operands, int64_t count, const RopeTables& tables,
          const RopeShape& shape, int threads) {
  const int64_t rows_of_block = std::max<int64_t>(1, kBlockElements / shape.features);
  auto rows_of = [&](int64_t i) { return shape.batch * operands[i].heads * shape.positions; };
  auto blocks_of = [&](int64_t i) { return (rows_of(i) + rows_of_block - 1) / rows_of_block; };
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) blocks += blocks_of(i);
  const int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, blocks)));
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t own = block, i = 0;
    while (own >= blocks_of(i)) own -= blocks_of(i++);
    const int64_t first = own * rows_of_block;
    rotate_block(operands[i], tables, shape, first, std::min(first + rows_of_block, rows_of(i)));
  }
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

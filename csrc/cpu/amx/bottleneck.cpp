// A bottleneck adapter in bf16 or fp32 on tiles: one pass over the rows each way, and one over the
// columns for the gradients of the weights.
//
// Floor, forward: x and the residual read, y written, 2 M (2 K + H) bytes in bf16 or less; backward
// 2 M (3 K + 2 H). 12 M K R operations at 16 cycles for each 16 x 16 x 32, in fp32 six times as
// many (terms.h): below R = 64 or so memory binds. What is R wide stays in a thread's caches;
// weights are packed once for all threads.
#include "bottleneck.h"

#include <atomic>

#include "amx/bottleneck_operands.h"
#include "amx/bottleneck_outer.h"
#include "threads.h"

namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

constexpr int64_t kNarrow = 48;  // as _NARROW of fasttune/_native/bottleneck.py

// finish(results, i, panel) with each of `count` packed blocks of rows times each panel of w, at
// most kSumSteps deep in fp32; a panel stays for all of them.
template <int Terms, typename BlockOf, typename Finish>
void multiply_blocks(const Packed<Terms>& w, int64_t count, BlockOf&& block, Finish&& finish) {
  alignas(64) float results[kRowsOfBlock * kColumnsOfPanel];
  for (int64_t panel = 0; panel < w.panels(); ++panel)
    for (int64_t i = 0; i < count; ++i) {
      clear_results();
      if constexpr (Terms > 1)
        multiply_terms(block(i), w.panel(panel), w.steps());
      else
        multiply(block(i), w.panel(panel), w.steps());
      store_results(results);
      finish(results, i, panel);
    }
}

// A packed block as multiply_blocks takes it.
template <int Terms>
inline auto block_of(const uint16_t* packed) {
  if constexpr (Terms == 1)
    return packed_block(packed);
  else
    return packed;
}

// The room of a thread: a chunk of rows packed, of what is thin, and of sums that come in parts.
template <int Terms>
struct Room {
  int64_t rows, thin, sums;  // elements of a block

  Room(const Rows<Terms>& wide, int64_t width)
      : rows(wide.elements()),
        thin(steps_of(width) * kTermsElements<Terms>),
        sums(Terms == 1 ? 0 : 2 * kRowsOfBlock * steps_of(width) * kColumnsOfPanel) {}
  int64_t elements(const Chunks& chunks) const { return chunks.each * (rows + thin + sums); }
};

// The same for a wide matrix of any depth, `count` blocks from `first` on.
template <int Terms, typename Finish>
void multiply_wide(const Rows<Terms>& wide, const Packed<Terms>& w, int64_t first, int64_t count,
                   const Room<Terms>& room, uint16_t* packed, float* sums, Finish&& finish) {
  if constexpr (Terms == 1) {
    Block blocks[kMostBlocks];
    for (int64_t i = 0; i < count; ++i)
      blocks[i] = wide.block(first + i * kRowsOfBlock, packed + i * room.rows);
    multiply_blocks<1>(w, count, [&](int64_t i) { return blocks[i]; }, finish);
  } else {
    constexpr int64_t kResults = kRowsOfBlock * kColumnsOfPanel;
    alignas(64) float results[kResults];
    const auto sum = [&](int64_t i, int64_t panel) {
      return sums + (i * w.panels() + panel) * kResults;
    };
    for (int64_t step = 0; step < w.steps(); step += wide.steps_of_sum()) {
      const int64_t steps = std::min(wide.steps_of_sum(), w.steps() - step);
      for (int64_t i = 0; i < count; ++i)
        wide.pack(first + i * kRowsOfBlock, step, steps, packed + i * room.rows);
      const bool whole = step + steps == w.steps();
      for (int64_t panel = 0; panel < w.panels(); ++panel)
        for (int64_t i = 0; i < count; ++i) {
          clear_results();
          multiply_terms(packed + i * room.rows, w.panel(panel, step), steps);
          store_results(results);
          if (step > 0 || !whole) add_results(results, step > 0, sum(i, panel));
          if (whole) finish(step > 0 ? sum(i, panel) : results, i, panel);
        }
    }
  }
}

// z = results + bias of rows from `row` and columns from `col`, and act(z) as a step of h.
template <int Terms, typename A>
void activate(const float* results, const float* bias, const MutableMatrix& z, int64_t row,
              int64_t col, uint16_t* h, int64_t step) {
  const int64_t left = z.cols - col, rows = std::min(kRowsOfBlock, z.rows - row);
  const __mmask16 first = lower_floats(left), second = lower_floats(left - kLanes);
  const Lanes added = bias ? load_row(bias + col, first, second) : Lanes{};
  for (int64_t i = 0; i < kRowsOfBlock; ++i) {
    const float* sums = results + i * kColumnsOfPanel;
    Lanes own{load(sums) + added.low, load(sums + kLanes) + added.high};
    if constexpr (Terms == 1) own = lanes_of(rounded(own.low, own.high));
    if (i < rows)
      store_row<true>(static_cast<Operand<Terms>*>(z.data) + (row + i) * z.stride + col, own, first,
                      second);
    put_row<Terms>(h, step, i, A::value(own.low), A::value(own.high));
  }
}

// The columns of y from `col` on that results are of: residual + keep * scale (results + bias).
template <typename A, typename R>
void widen(const float* results, const Matrix* residual, const float* bias, const float* scale,
           float factor, const KeepMask& mask, const MutableMatrix& y, int64_t row, int64_t col) {
  const int64_t rows = std::min(kRowsOfBlock, y.rows - row), left = y.cols - col;
  const __mmask16 first = lower_floats(left), second = lower_floats(left - kLanes);
  const Lanes added = bias ? load_row(bias + col, first, second) : Lanes{};
  Lanes scales = scale ? load_row(scale + col, first, second) : Lanes{splat(1.0f), splat(1.0f)};
  scales.low *= factor, scales.high *= factor;
  for (int64_t i = 0; i < rows; ++i) {
    const float* sums = results + i * kColumnsOfPanel;
    Lanes out{(load(sums) + added.low) * scales.low,
              (load(sums + kLanes) + added.high) * scales.high};
    if (!mask.keeps_all()) {
      const auto kept =
          static_cast<uint32_t>(mask.span(row + i, col / kMaskSpan * kMaskSpan) >> col % kMaskSpan);
      out.low = keep_lanes(out.low, kept), out.high = keep_lanes(out.high, kept >> kLanes);
    }
    if constexpr (!std::is_void_v<A>) {
      const A* from = static_cast<const A*>(residual->data) + (row + i) * residual->stride + col;
      const Lanes own = load_row(from, first, second);
      out.low += own.low, out.high += own.high;
    }
    store_row(static_cast<R*>(y.data) + (row + i) * y.stride + col, out, first, second);
  }
}

// dz = factor results act'(z) and h = act(z): dz as a step of a packed block, both transposed.
template <int Terms, typename A>
void differentiate(const float* results, const Matrix& z, float factor, int64_t row, int64_t col,
                   uint16_t* dz, Turned<Terms>& turned_dz, Turned<Terms>* turned_h) {
  alignas(64) float slopes[kRowsOfBlock * kColumnsOfPanel], values[kRowsOfBlock * kColumnsOfPanel];
  const int64_t left = z.cols - col, rows = std::min(kRowsOfBlock, z.rows - row);
  const __mmask16 first_lanes = lower_floats(left), second_lanes = lower_floats(left - kLanes);
  const int64_t step = col / kColumnsOfPanel;
  for (int64_t i = 0; i < kRowsOfBlock; ++i) {
    float* slope = slopes + i * kColumnsOfPanel;
    float* value = values + i * kColumnsOfPanel;
    if (i >= rows) {  // whatever the products gave
      std::fill_n(slope, kColumnsOfPanel, 0.0f), std::fill_n(value, kColumnsOfPanel, 0.0f);
      continue;
    }
    const Lanes own = load_row(element_of<Terms>(z, row + i, col), first_lanes, second_lanes);
    const float* sums = results + i * kColumnsOfPanel;
    const Jet low = A::jet(own.low), high = A::jet(own.high);
    const vf first = load(sums) * factor * low.slope;
    const vf second = load(sums + kLanes) * factor * high.slope;
    store(slope, first), store(slope + kLanes, second);
    store(value, low.value), store(value + kLanes, high.value);
    put_row<Terms>(dz, step, i, first, second);
  }
  turned_dz.put(slopes, step, row / kRowsOfBlock);
  if (turned_h) turned_h->put(values, step, row / kRowsOfBlock);
}

// Types of what is added and of the output: in fp32 that is all they are.
template <int Terms, typename Body>
void with_types_of(const Matrix* addend, DType out, Body&& body) {
  if constexpr (Terms == 1) return with_types(addend, out, body);
  if (addend) return body(Type<float>{}, Type<float>{});
  body(Type<void>{}, Type<float>{});
}

template <int Terms>
bool forward(const Bottleneck& adapter, const Matrix* residual, const Matrix* up_bias,
             const Matrix* scale, const MutableMatrix& z, const MutableMatrix& y, int threads) {
  const Vector down_bias(adapter.down_bias), added(up_bias), scales(scale);
  const KeepMask mask(adapter.dropout), keep_all(Dropout{});
  const Rows<Terms> rows(adapter.x, keep_all);
  const Room<Terms> own(rows, z.cols);
  const Chunks chunks(y.rows, own.rows, threads);
  const int team = static_cast<int>(std::min<int64_t>(threads, chunks.count));
  const TileScratch scratch(Packed<Terms>::elements(adapter.down) +
                            Packed<Terms>::elements(adapter.up) + team * own.elements(chunks));
  uint16_t* room = scratch.data();
  Packed<Terms> down(adapter.down, true, room), up(adapter.up, true, room);

  const auto run = [&](auto act, auto addend, auto result, int64_t chunk) {
    using A = typename decltype(addend)::type;
    using R = typename decltype(result)::type;
    uint16_t* packed = room + thread_index() * own.elements(chunks);
    uint16_t* h = packed + chunks.each * own.rows;
    const int64_t first = chunk * chunks.each * kRowsOfBlock, count = chunks.of(chunk);
    const auto row = [&](int64_t i) { return first + i * kRowsOfBlock; };
    multiply_wide<Terms>(
        rows, down, first, count, own, packed, reinterpret_cast<float*>(h + chunks.each * own.thin),
        [&](const float* results, int64_t i, int64_t panel) {
          activate<Terms, decltype(act)>(results, down_bias.data(), z, row(i),
                                         panel * kColumnsOfPanel, h + i * own.thin, panel);
        });
    multiply_blocks<Terms>(
        up, count, [&](int64_t i) { return block_of<Terms>(h + i * own.thin); },
        [&](const float* results, int64_t i, int64_t panel) {
          widen<A, R>(results, residual, added.data(), scales.data(), adapter.factor, mask, y,
                      row(i), panel * kColumnsOfPanel);
        });
  };
  std::atomic<bool> finite{true};
  with_activation_or_none(adapter.activation, [&](auto act) {
    with_types_of<Terms>(residual, y.dtype, [&](auto addend, auto result) {
#pragma omp parallel num_threads(team)
      {
        split_not_finite = false;
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < down.items(); ++item) down.pack(item);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < up.items(); ++item) up.pack(item);
        [[maybe_unused]] const UseTiles use;
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks.count; ++chunk) run(act, addend, result, chunk);
        _mm_sfence();
        if (split_not_finite) finite.store(false);
      }
    });
  });
  return Terms == 1 || finite.load();
}

template <int Terms>
bool backward(const Bottleneck& adapter, const Matrix& dy, const Matrix& z, const Matrix* addend,
              float outer_factor, const BottleneckGradients& gradients, int threads) {
  Dropout dropout = adapter.dropout;
  std::vector<uint64_t> bits;  // drawn once for both reads of dy
  if (dropout.threshold != 0) {
    dropout.drawn_stride = (dy.cols + kMaskSpan - 1) / kMaskSpan;
    bits.resize(dy.rows * dropout.drawn_stride);
    avx512::table().draw(dropout, dy.rows, dy.cols, bits.data(), threads);
    dropout.drawn = bits.data();
  }
  const KeepMask mask(dropout), keep_all(Dropout{});
  const Rows<Terms> rows(dy, mask);
  const Room<Terms> own(rows, z.cols);
  const Chunks chunks(dy.rows, own.rows, threads);
  const bool inner = gradients.dx || gradients.down || gradients.down_bias || gradients.up;
  const int64_t spans_x = gradients.down ? (adapter.x.cols + kMaskSpan - 1) / kMaskSpan : 0;
  const int64_t spans_dy =
      gradients.up || gradients.up_bias ? (dy.cols + kMaskSpan - 1) / kMaskSpan : 0;
  const int team = static_cast<int>(
      std::min<int64_t>(threads, std::max(inner ? chunks.count : 1, spans_x + spans_dy)));
  const TileScratch scratch(
      Packed<Terms>::elements(adapter.down) + Packed<Terms>::elements(adapter.up) +
      2 * Turned<Terms>::elements(z.rows, z.cols) + team * own.elements(chunks));
  uint16_t* room = scratch.data();
  Packed<Terms> up(adapter.up, false, room), down(adapter.down, false, room);
  Turned<Terms> dz(z.rows, z.cols, room), h(z.rows, z.cols, room);
  const MutableMatrix none{};
  const MutableMatrix& dx = gradients.dx ? *gradients.dx : none;

  const auto run = [&](auto act, auto added, auto result, int64_t chunk) {
    using A = typename decltype(added)::type;
    using R = typename decltype(result)::type;
    uint16_t* packed = room + thread_index() * own.elements(chunks);
    uint16_t* thin_rows = packed + chunks.each * own.rows;
    const int64_t first = chunk * chunks.each * kRowsOfBlock, count = chunks.of(chunk);
    const auto row = [&](int64_t i) { return first + i * kRowsOfBlock; };
    multiply_wide<Terms>(rows, up, first, count, own, packed,
                         reinterpret_cast<float*>(thin_rows + chunks.each * own.thin),
                         [&](const float* results, int64_t i, int64_t panel) {
                           differentiate<Terms, decltype(act)>(
                               results, z, adapter.factor, row(i), panel * kColumnsOfPanel,
                               thin_rows + i * own.thin, dz, gradients.up ? &h : nullptr);
                         });
    if (!gradients.dx) return;
    multiply_blocks<Terms>(
        down, count, [&](int64_t i) { return block_of<Terms>(thin_rows + i * own.thin); },
        [&](const float* results, int64_t i, int64_t panel) {
          widen<A, R>(results, addend, nullptr, nullptr, 1.0f, keep_all, dx, row(i),
                      panel * kColumnsOfPanel);
        });
  };
  const auto span = [&](int64_t index) {
    alignas(64) float sums[kMaxRank * kMaskSpan];
    if (index < spans_x) {
      outer<Terms>(adapter.x, &dz, keep_all, index * kMaskSpan, sums, nullptr);
      return store_rows(sums, *gradients.down, index * kMaskSpan);
    }
    const int64_t col = (index - spans_x) * kMaskSpan;
    vf columns[4] = {};
    outer<Terms>(dy, gradients.up ? &h : nullptr, mask, col, sums,
                 gradients.up_bias ? columns : nullptr);
    if (gradients.up) store_columns(sums, outer_factor, *gradients.up, col);
    if (gradients.up_bias) store_sums(columns, outer_factor, *gradients.up_bias, col);
  };
  std::atomic<bool> finite{true};
  with_activation_or_none(adapter.activation, [&](auto act) {
    with_types_of<Terms>(addend, dx.dtype, [&](auto added, auto result) {
#pragma omp parallel num_threads(team)
      {
        split_not_finite = false;
        if (inner) {
#pragma omp for schedule(static) nowait
          for (int64_t item = 0; item < up.items(); ++item) up.pack(item);
#pragma omp for schedule(static)
          for (int64_t item = 0; item < down.items(); ++item) down.pack(item);
        }
        [[maybe_unused]] const UseTiles use;
        if (inner) {
#pragma omp for schedule(static)
          for (int64_t chunk = 0; chunk < chunks.count; ++chunk) run(act, added, result, chunk);
        }
        _mm_sfence();
        if (gradients.down_bias) {
#pragma omp single nowait
          dz.sum(*gradients.down_bias);
        }
#pragma omp for schedule(dynamic)
        for (int64_t index = 0; index < spans_x + spans_dy; ++index) span(index);
        if (split_not_finite) finite.store(false);
      }
    });
  });
  return Terms == 1 || finite.load();
}

// Narrow adapters in fp32: splitting operands would take longer than multiplying them.
bool narrow(const Bottleneck& adapter) {
  const int64_t width = adapter.down.rows;
  return width <= kNarrow && width % kLanes == 0 && adapter.dropout.threshold == 0;
}

}  // namespace

bool bottleneck_forward(const Bottleneck& adapter, const Matrix* residual, const Matrix* up_bias,
                        const Matrix* scale, const MutableMatrix& z, const MutableMatrix& y,
                        int threads) {
  if (adapter.x.dtype != DType::kBFloat16 && narrow(adapter))
    return avx512::table().bottleneck_forward(adapter, residual, up_bias, scale, z, y, threads);
  const auto run = adapter.x.dtype == DType::kBFloat16 ? forward<1> : forward<3>;
  return run(adapter, residual, up_bias, scale, z, y, threads);
}

bool bottleneck_backward(const Bottleneck& adapter, const Matrix& dy, const Matrix& z,
                         const Matrix* addend, float outer_factor,
                         const BottleneckGradients& gradients, int threads) {
  if (adapter.x.dtype != DType::kBFloat16 && narrow(adapter))
    return avx512::table().bottleneck_backward(adapter, dy, z, addend, outer_factor, gradients,
                                               threads);
  const auto run = adapter.x.dtype == DType::kBFloat16 ? backward<1> : backward<3>;
  return run(adapter, dy, z, addend, outer_factor, gradients, threads);
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

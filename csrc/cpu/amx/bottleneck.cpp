// A bottleneck adapter in bf16 on tiles: one pass over the rows each way, and one over the columns
// for the gradients of the weights.
//
// Floor, forward: x and the residual read, y written, 2 M (2 K + H) bytes or less; backward 2 M
// (3 K + 2 H). 12 M K R operations at 16 cycles for each 16 x 16 x 32: below R = 64 or so memory
// binds. What is R wide stays in a thread's caches; weights are packed once for all threads.
#include "bottleneck.h"

#include "amx/bottleneck_operands.h"
#include "amx/bottleneck_outer.h"
#include "threads.h"

namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

inline Lanes lanes_of(__m512i row) {
  return {upper_halves(_mm512_castsi512_si256(row)),
          upper_halves(_mm512_extracti64x4_epi64(row, 1))};
}

// finish(results, i, panel) with each of `count` blocks of rows times each panel of w; a panel
// stays for all of them.
template <typename BlockOf, typename Finish>
void multiply_blocks(const Packed& w, int64_t count, BlockOf&& block, Finish&& finish) {
  alignas(64) float results[kRowsOfBlock * kColumnsOfPanel];
  for (int64_t panel = 0; panel < w.panels(); ++panel)
    for (int64_t i = 0; i < count; ++i) {
      clear_results();
      multiply(block(i), w.panel(panel), w.steps());
      store_results(results);
      finish(results, i, panel);
    }
}

// z = results + bias of rows from `row` and columns from `col`, and act(z) as a step of h.
template <typename A>
void activate(const float* results, const float* bias, const MutableMatrix& z, int64_t row,
              int64_t col, uint16_t* h, int64_t step) {
  const int64_t left = z.cols - col, rows = std::min(kRowsOfBlock, z.rows - row);
  const __mmask16 first = lower_floats(left), second = lower_floats(left - kLanes);
  const Lanes added = bias ? load_row(bias + col, first, second) : Lanes{};
  for (int64_t i = 0; i < kRowsOfBlock; ++i) {
    const float* sums = results + i * kColumnsOfPanel;
    const __m512i own = rounded(load(sums) + added.low, load(sums + kLanes) + added.high);
    if (i < rows)
      _mm512_mask_storeu_epi16(static_cast<uint16_t*>(z.data) + (row + i) * z.stride + col,
                               lower_lanes(left), own);
    const Lanes value = lanes_of(own);
    _mm512_store_si512(row_of_step(h, step, i), rounded(A::value(value.low), A::value(value.high)));
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
template <typename A>
void differentiate(const float* results, const Matrix& z, float factor, int64_t row, int64_t col,
                   uint16_t* dz, Turned& turned_dz, Turned* turned_h) {
  alignas(64) float slopes[kRowsOfBlock * kColumnsOfPanel], values[kRowsOfBlock * kColumnsOfPanel];
  const int64_t left = z.cols - col, rows = std::min(kRowsOfBlock, z.rows - row);
  const int64_t step = col / kColumnsOfPanel;
  for (int64_t i = 0; i < kRowsOfBlock; ++i) {
    float* slope = slopes + i * kColumnsOfPanel;
    float* value = values + i * kColumnsOfPanel;
    if (i >= rows) {  // whatever the products gave
      std::fill_n(slope, kColumnsOfPanel, 0.0f), std::fill_n(value, kColumnsOfPanel, 0.0f);
      continue;
    }
    const Lanes own = lanes_of(_mm512_maskz_loadu_epi16(lower_lanes(left), at(z, row + i, col)));
    const float* sums = results + i * kColumnsOfPanel;
    const Jet low = A::jet(own.low), high = A::jet(own.high);
    const vf first = load(sums) * factor * low.slope;
    const vf second = load(sums + kLanes) * factor * high.slope;
    store(slope, first), store(slope + kLanes, second);
    store(value, low.value), store(value + kLanes, high.value);
    _mm512_store_si512(row_of_step(dz, step, i), rounded(first, second));
  }
  turned_dz.put(slopes, 2 * step, row / kRowsOfBlock);
  if (turned_h) turned_h->put(values, 2 * step, row / kRowsOfBlock);
}

}  // namespace

void bottleneck_forward(const Bottleneck& adapter, const Matrix* residual, const Matrix* up_bias,
                        const Matrix* scale, const MutableMatrix& z, const MutableMatrix& y,
                        int threads) {
  if (adapter.x.dtype != DType::kBFloat16)
    return avx512::table().bottleneck_forward(adapter, residual, up_bias, scale, z, y, threads);
  const Vector down_bias(adapter.down_bias), added(up_bias), scales(scale);
  const KeepMask mask(adapter.dropout), keep_all(Dropout{});
  const Rows rows(adapter.x, keep_all);
  const Chunks chunks(y.rows, rows.elements(), threads);
  const int64_t thin = steps_of(z.cols) * kStepElements;
  const int64_t own = chunks.each * (rows.elements() + thin);
  const int team = static_cast<int>(std::min<int64_t>(threads, chunks.count));
  const TileScratch scratch(Packed::elements(adapter.down) + Packed::elements(adapter.up) +
                            team * own);
  uint16_t* room = scratch.data();
  Packed down(adapter.down, true, room), up(adapter.up, true, room);

  const auto run = [&](auto act, auto addend, auto result, int64_t chunk) {
    using A = typename decltype(addend)::type;
    using R = typename decltype(result)::type;
    uint16_t *packed = room + thread_index() * own, *h = packed + chunks.each * rows.elements();
    const int64_t first = chunk * chunks.each * kRowsOfBlock, count = chunks.of(chunk);
    Block blocks[kMostBlocks];
    rows.blocks(first, count, packed, blocks);
    const auto row = [&](int64_t i) { return first + i * kRowsOfBlock; };
    multiply_blocks(
        down, count, [&](int64_t i) { return blocks[i]; },
        [&](const float* results, int64_t i, int64_t panel) {
          activate<decltype(act)>(results, down_bias.data(), z, row(i), panel * kColumnsOfPanel,
                                  h + i * thin, panel);
        });
    multiply_blocks(
        up, count, [&](int64_t i) { return packed_block(h + i * thin); },
        [&](const float* results, int64_t i, int64_t panel) {
          widen<A, R>(results, residual, added.data(), scales.data(), adapter.factor, mask, y,
                      row(i), panel * kColumnsOfPanel);
        });
  };
  with_activation_or_none(adapter.activation, [&](auto act) {
    with_types(residual, y.dtype, [&](auto addend, auto result) {
#pragma omp parallel num_threads(team)
      {
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < down.items(); ++item) down.pack(item);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < up.items(); ++item) up.pack(item);
        [[maybe_unused]] const UseTiles use;
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks.count; ++chunk) run(act, addend, result, chunk);
        _mm_sfence();
      }
    });
  });
}

void bottleneck_backward(const Bottleneck& adapter, const Matrix& dy, const Matrix& z,
                         const Matrix* addend, float outer_factor,
                         const BottleneckGradients& gradients, int threads) {
  if (adapter.x.dtype != DType::kBFloat16)
    return avx512::table().bottleneck_backward(adapter, dy, z, addend, outer_factor, gradients,
                                               threads);
  Dropout dropout = adapter.dropout;
  std::vector<uint64_t> bits;  // drawn once for both reads of dy
  if (dropout.threshold != 0) {
    dropout.drawn_stride = (dy.cols + kMaskSpan - 1) / kMaskSpan;
    bits.resize(dy.rows * dropout.drawn_stride);
    avx512::table().draw(dropout, dy.rows, dy.cols, bits.data(), threads);
    dropout.drawn = bits.data();
  }
  const KeepMask mask(dropout), keep_all(Dropout{});
  const Rows rows(dy, mask);
  const Chunks chunks(dy.rows, rows.elements(), threads);
  const int64_t thin = steps_of(z.cols) * kStepElements;
  const int64_t own = chunks.each * (rows.elements() + thin);
  const bool inner = gradients.dx || gradients.down || gradients.down_bias || gradients.up;
  const int64_t spans_x = gradients.down ? (adapter.x.cols + kMaskSpan - 1) / kMaskSpan : 0;
  const int64_t spans_dy =
      gradients.up || gradients.up_bias ? (dy.cols + kMaskSpan - 1) / kMaskSpan : 0;
  const int team = static_cast<int>(
      std::min<int64_t>(threads, std::max(inner ? chunks.count : 1, spans_x + spans_dy)));
  const TileScratch scratch(Packed::elements(adapter.down) + Packed::elements(adapter.up) +
                            2 * Turned::elements(z.rows, z.cols) + team * own);
  uint16_t* room = scratch.data();
  Packed up(adapter.up, false, room), down(adapter.down, false, room);
  Turned dz(z.rows, z.cols, room), h(z.rows, z.cols, room);
  const MutableMatrix none{};
  const MutableMatrix& dx = gradients.dx ? *gradients.dx : none;

  const auto run = [&](auto act, auto added, auto result, int64_t chunk) {
    using A = typename decltype(added)::type;
    using R = typename decltype(result)::type;
    uint16_t* packed = room + thread_index() * own;
    uint16_t* thin_rows = packed + chunks.each * rows.elements();
    const int64_t first = chunk * chunks.each * kRowsOfBlock, count = chunks.of(chunk);
    Block blocks[kMostBlocks];
    rows.blocks(first, count, packed, blocks);
    const auto row = [&](int64_t i) { return first + i * kRowsOfBlock; };
    multiply_blocks(
        up, count, [&](int64_t i) { return blocks[i]; },
        [&](const float* results, int64_t i, int64_t panel) {
          differentiate<decltype(act)>(results, z, adapter.factor, row(i), panel * kColumnsOfPanel,
                                       thin_rows + i * thin, dz, gradients.up ? &h : nullptr);
        });
    if (!gradients.dx) return;
    multiply_blocks(
        down, count, [&](int64_t i) { return packed_block(thin_rows + i * thin); },
        [&](const float* results, int64_t i, int64_t panel) {
          widen<A, R>(results, addend, nullptr, nullptr, 1.0f, keep_all, dx, row(i),
                      panel * kColumnsOfPanel);
        });
  };
  const auto span = [&](int64_t index) {
    alignas(64) float sums[kMaxRank * kMaskSpan];
    if (index < spans_x) {
      outer(adapter.x, &dz, keep_all, index * kMaskSpan, sums, nullptr);
      return store_rows(sums, *gradients.down, index * kMaskSpan);
    }
    const int64_t col = (index - spans_x) * kMaskSpan;
    __m512 columns[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                         _mm512_setzero_ps()};
    outer(dy, gradients.up ? &h : nullptr, mask, col, sums, gradients.up_bias ? columns : nullptr);
    if (gradients.up) store_columns(sums, outer_factor, *gradients.up, col);
    if (gradients.up_bias) store_sums(columns, outer_factor, *gradients.up_bias, col);
  };
  with_activation_or_none(adapter.activation, [&](auto act) {
    with_types(addend, dx.dtype, [&](auto added, auto result) {
#pragma omp parallel num_threads(team)
      {
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
      }
    });
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

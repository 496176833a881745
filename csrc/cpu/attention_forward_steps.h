// The forward of attention but for its products: who computes what when, and the running softmax.
// Steps, a type that a build fills in, loads operands and multiplies them:
//
//   Thread: what a thread holds while it works
//   load_queries(inputs, sizes, batch, pair)
//   load_keys(inputs, sizes, batch, kv_head, key, keys, scratch): the block's keys and values
//   scores(shape, sizes, limits, pair, scratch): into scratch.scores, -infinity where masked
//   add_values(sizes, limits, pair, scratch): pair.sums = sums * factors + scores values, where the
//     scores have become exponentials
#pragma once

#include <cmath>

#include "attention_blocks.h"
#include "math.h"

namespace fasttune::cpu::FASTTUNE_ISA {

// One (row block, head) pair: its queries and the state of its running softmax.
struct Pair {
  int64_t head, row, rows;
  float *queries, *sums, *totals, *maxima;
};

// Rows of scores become exp(score - maximum); the maximum, the partial sums of exponentials and the
// factor that the running sums of the row take move on.
inline void exponentials(const Limits& limits, Pair& pair, float* scores, float* factors) {
  for (int64_t row = 0; row < kBlockRows; ++row) {
    const int64_t columns = limits.widest[row / kTileRows];
    factors[row] = 0.0f;  // of a row that stays as it is: exp(0) below
    if (columns == 0) continue;
    const float* score = scores + row * kBlockKeys;
    vr best = load_vr(score);
    for (int64_t j = kRegisterLanes; j < columns; j += kRegisterLanes)
      best = max(load_vr(score + j), best);
    const float old = pair.maxima[row], top = std::max(old, fold_max(best));
    // Nothing to attend to yet: subtract 0, so that exp(-infinity) is 0 and no NaN.
    factors[row] = old - (top == -kInfinity ? 0.0f : top);
    pair.maxima[row] = top;
  }
  for (int64_t row = 0; row < kBlockRows; row += kRegisterLanes)
    store(factors + row, exp_nonpositive(load_vr(factors + row)));
  for (int64_t row = 0; row < kBlockRows; ++row) {
    const int64_t columns = limits.widest[row / kTileRows];
    if (columns == 0) continue;
    float* score = scores + row * kBlockKeys;
    const vr top = splat_vr(pair.maxima[row] == -kInfinity ? 0.0f : pair.maxima[row]);
    vr total = load_vr(pair.totals + row * kRegisterLanes) * splat_vr(factors[row]);
    for (int64_t j = 0; j < columns; j += kRegisterLanes) {
      const vr e = exp_nonpositive(load_vr(score + j) - top);
      store(score + j, e);
      total += e;
    }
    store(pair.totals + row * kRegisterLanes, total);
  }
}

template <typename Steps>
void start_pair(const AttentionInputs& inputs, const AttentionSizes& sizes, int64_t batch,
                Pair& pair) {
  Steps::load_queries(inputs, sizes, batch, pair);
  std::fill_n(pair.sums, kBlockRows * sizes.stride, 0.0f);
  std::fill_n(pair.totals, kBlockRows * kLanes, 0.0f);
  std::fill_n(pair.maxima, kBlockRows, -kInfinity);
}

inline void finish_pair(const AttentionShape& shape, const AttentionSizes& sizes, int64_t batch,
                        const Pair& pair, const MutableHeads& out, float* row_maximum,
                        float* row_sum) {
  const int64_t first = (batch * shape.heads + pair.head) * shape.queries + pair.row;
  for (int64_t i = 0; i < pair.rows; ++i) {
    row_maximum[first + i] = pair.maxima[i] == -kInfinity ? 0.0f : pair.maxima[i];
    row_sum[first + i] = fold_sum(load_vr(pair.totals + i * kRegisterLanes));
  }
  store_rows(
      shape.dtype, pair.sums, sizes.stride, pair.rows, shape.width,
      [&](int64_t i) { return row_sum[first + i] == 0.0f ? 0.0f : 1.0f / row_sum[first + i]; },
      at(out, shape.dtype, batch, pair.head, pair.row), out.row_stride);
}

template <typename Steps>
void forward_item(const AttentionInputs& inputs, const ForwardPlan& plan, int64_t item,
                  const MutableHeads& out, float* row_maximum, float* row_sum,
                  const ForwardScratch& s) {
  const AttentionShape& shape = inputs.shape;
  const AttentionSizes& sizes = plan.sizes;
  // The last rows of a causal triangle see the most keys: they come first.
  const int64_t unit = item % sizes.units, part = plan.items_per_unit - 1 - item / sizes.units;
  const int64_t batch = unit / shape.kv_heads, kv_head = unit % shape.kv_heads;
  const int64_t first = part * plan.pairs_per_item;
  const int64_t last = std::min(first + plan.pairs_per_item, sizes.group * sizes.row_blocks);
  const auto pair_of = [&](int64_t index) {
    const int64_t row = index / sizes.group * kBlockRows, local = index - first;
    return Pair{kv_head * sizes.group + index % sizes.group,
                row,
                std::min(kBlockRows, shape.queries - row),
                s.queries + local * kBlockRows * sizes.stride,
                s.sums + local * kBlockRows * sizes.stride,
                s.totals + local * kBlockRows * kLanes,
                s.maxima + local * kBlockRows};
  };
  for (int64_t index = first; index < last; ++index) {
    Pair pair = pair_of(index);
    start_pair<Steps>(inputs, sizes, batch, pair);
  }
  const int64_t key_blocks = sizes.visible((last - 1) / sizes.group);
  Limits limits;
  for (int64_t block = 0; block < key_blocks; ++block) {
    const int64_t key = block * kBlockKeys, keys = std::min(kBlockKeys, shape.keys - key);
    Steps::load_keys(inputs, sizes, batch, kv_head, key, keys, s);
    for (int64_t index = first, row = -1; index < last; ++index) {
      if (sizes.visible(index / sizes.group) <= block) continue;
      Pair pair = pair_of(index);
      if (pair.row != row || inputs.mask.head_stride != 0)
        set_limits(inputs, batch, pair.head, pair.row, key, s.bias, limits);
      row = pair.row;
      if (limits.columns == 0) continue;
      Steps::scores(shape, sizes, limits, pair, s);
      exponentials(limits, pair, s.scores, s.factors);
      Steps::add_values(sizes, limits, pair, s);
    }
  }
  for (int64_t index = first; index < last; ++index)
    finish_pair(shape, sizes, batch, pair_of(index), out, row_maximum, row_sum);
}

template <typename Steps>
void forward(const AttentionInputs& inputs, const MutableHeads& out, float* row_maximum,
             float* row_sum, float* scratch, int threads) {
  const ForwardPlan plan(inputs.shape, threads);
  Arena measure(nullptr);
  ForwardScratch(plan, measure);
#pragma omp parallel num_threads(plan.team)
  {
    [[maybe_unused]] const typename Steps::Thread thread;
    Arena arena(scratch + thread_index() * measure.used());
    const ForwardScratch buffers(plan, arena);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < plan.items; ++item)
      forward_item<Steps>(inputs, plan, item, out, row_maximum, row_sum, buffers);
  }
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

// The backward of attention but for its products: who computes what when, and in which order sums
// add up. Steps, a type that a build fills in, loads operands and multiplies them:
//
//   Thread: what a thread holds while it works
//   kScaled: whether the scale of the scores came with the queries
//   load_keys(call, batch, kv_head, key, scratch): the block's keys and values
//   load_pair(call, batch, head, row, scratch): queries and dout of a row block
//   add_keys(call, limits, scratch): the gradients of the scores, and what they and the weights add
//     to scratch.dkeys and scratch.dvalues
//   add_dq(sizes, limits, scratch, dq): what they add to dq, in the layout that store_dq reads
//   store_dq(call, batch, head, row, dq)
#pragma once

#include <new>
#include <thread>

#include "attention_blocks.h"
#include "math.h"

namespace fasttune::cpu::FASTTUNE_ISA {

struct Call {
  const AttentionInputs& inputs;
  const AttentionResults& results;
  const AttentionGradients& gradients;
  const BackwardPlan& plan;

  bool need_dq() const { return gradients.dq.data; }
  bool need_dk() const { return gradients.dk.data; }
  bool need_dv() const { return gradients.dv.data; }
  bool need_dscores() const { return need_dq() || need_dk(); }
};

// delta = rowsum(dout * out) of one row. The heads of a position come one after the other: that is
// how a model lays them out.
inline void row_delta(const Call& call, int64_t index, float* delta) {
  const AttentionShape& shape = call.inputs.shape;
  const int64_t head = index % shape.heads, row = index / shape.heads % shape.queries;
  const int64_t batch = index / shape.heads / shape.queries;
  with_element(shape.dtype, [&](auto element) {
    using E = decltype(element);
    using T = const typename E::type*;
    const T out = static_cast<T>(at(call.results.out, shape.dtype, batch, head, row));
    const T dout = static_cast<T>(at(call.results.dout, shape.dtype, batch, head, row));
    const int64_t whole = shape.width / kLanes * kLanes;
    vf lanes = {};
    for (int64_t j = 0; j < whole; j += kLanes) lanes += E::load(out + j) * E::load(dout + j);
    float total = fold_sum(lanes);
    for (int64_t j = whole; j < shape.width; ++j)
      total += E::load_one(out + j) * E::load_one(dout + j);
    delta[(batch * shape.heads + head) * shape.queries + row] = total;
  });
}

// What the forward left of the rows of a row block; a row beyond the matrix has weight 0.
inline void load_row_facts(const Call& call, int64_t batch, int64_t head, int64_t row,
                           const float* delta, const BackwardScratch& s) {
  const AttentionShape& shape = call.inputs.shape;
  const int64_t rows = std::min(kBlockRows, shape.queries - row);
  const int64_t first = (batch * shape.heads + head) * shape.queries + row;
  for (int64_t i = 0; i < kBlockRows; ++i) {
    const float sum = i < rows ? call.results.row_sum[first + i] : 0.0f;
    s.inverses[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
    s.maxima[i] = i < rows ? call.results.row_maximum[first + i] : 0.0f;
    s.deltas[i] = i < rows ? delta[first + i] : 0.0f;
  }
}

// Where a unit's dq adds up, and whose turn it is at each of its (row block, head) pairs; progress
// is null where one thread takes all key blocks.
struct DqTarget {
  float* dq;                       // [row_blocks, group, kBlockRows, stride]
  std::atomic<int32_t>* progress;  // [row_blocks, group]
};

inline void wait_for(const std::atomic<int32_t>& counter, int64_t value) {
  for (int64_t spins = 0; counter.load(std::memory_order_acquire) < value; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

template <typename Steps>
void backward_block(const Call& call, int64_t unit, int64_t block, const float* delta,
                    const DqTarget& target, const BackwardScratch& s) {
  const AttentionShape& shape = call.inputs.shape;
  const AttentionSizes& sizes = call.plan.sizes;
  const int64_t batch = unit / shape.kv_heads, kv_head = unit % shape.kv_heads;
  const int64_t key = block * kBlockKeys;
  Steps::load_keys(call, batch, kv_head, key, s);
  std::fill_n(s.dkeys, kBlockKeys * sizes.stride, 0.0f);
  std::fill_n(s.dvalues, kBlockKeys * sizes.stride, 0.0f);
  Limits limits;
  for (int64_t row_block = sizes.first_row_block(block); row_block < sizes.row_blocks;
       ++row_block) {
    const int64_t row = row_block * kBlockRows;
    for (int64_t member = 0; member < sizes.group; ++member) {
      const int64_t head = kv_head * sizes.group + member;
      if (member == 0 || call.inputs.mask.head_stride != 0)
        set_limits(call.inputs, batch, head, row, key, s.bias, limits);
      if (limits.columns > 0) {
        Steps::load_pair(call, batch, head, row, s);
        load_row_facts(call, batch, head, row, delta, s);
        Steps::add_keys(call, limits, s);
      }
      if (!call.need_dq()) continue;
      const int64_t pair = row_block * sizes.group + member;
      float* dq = target.dq + pair * kBlockRows * sizes.stride;
      if (target.progress) wait_for(target.progress[pair], block);
      if (block == 0) std::fill_n(dq, kBlockRows * sizes.stride, 0.0f);
      if (limits.columns > 0) Steps::add_dq(sizes, limits, s, dq);
      if (block == sizes.visible(row_block) - 1) Steps::store_dq(call, batch, head, row, dq);
      if (target.progress)
        target.progress[pair].store(static_cast<int32_t>(block + 1), std::memory_order_release);
    }
  }
  const int64_t keys = std::min(kBlockKeys, shape.keys - key);
  const auto store_block = [&](const MutableHeads& out, const float* sums, float scale) {
    if (out.data)
      store_rows(
          shape.dtype, sums, sizes.stride, keys, shape.width, [&](int64_t) { return scale; },
          at(out, shape.dtype, batch, kv_head, key), out.row_stride);
  };
  store_block(call.gradients.dk, s.dkeys, Steps::kScaled ? 1.0f : shape.scale);
  store_block(call.gradients.dv, s.dvalues, 1.0f);
}

template <typename Steps>
void backward_item(const Call& call, int64_t item, const BackwardShared& shared,
                   const BackwardScratch& s) {
  const BackwardPlan& plan = call.plan;
  const AttentionSizes& sizes = plan.sizes;
  if (item < plan.whole_units) {
    for (int64_t block = 0; block < sizes.key_blocks; ++block)
      backward_block<Steps>(call, item, block, shared.delta, {s.dq, nullptr}, s);
    return;
  }
  const int64_t number = (item - plan.whole_units) / sizes.key_blocks;
  const int64_t block = (item - plan.whole_units) % sizes.key_blocks;
  const int64_t unit = plan.whole_units + number;
  const int64_t before = number - plan.shared_slots;  // who had this buffer
  if (before >= 0) wait_for(shared.done[plan.whole_units + before], sizes.key_blocks);
  const DqTarget target{shared.dq + number % plan.shared_slots * plan.dq_size,
                        shared.progress + unit * sizes.group * sizes.row_blocks};
  backward_block<Steps>(call, unit, block, shared.delta, target, s);
  shared.done[unit].fetch_add(1, std::memory_order_acq_rel);
}

template <typename Steps>
void backward(const AttentionInputs& inputs, const AttentionResults& results,
              const AttentionGradients& gradients, float* scratch, int threads) {
  const AttentionShape& shape = inputs.shape;
  const BackwardPlan plan(shape, threads);
  const Call call{inputs, results, gradients, plan};
  Arena common(scratch), measure(nullptr);
  const BackwardShared shared(shape, plan, common);
  BackwardScratch(plan, measure);
  const int64_t pairs = plan.sizes.units * plan.sizes.group * plan.sizes.row_blocks;
  for (int64_t i = 0; i < pairs; ++i) new (shared.progress + i) std::atomic<int32_t>(0);
  for (int64_t i = 0; i < plan.sizes.units; ++i) new (shared.done + i) std::atomic<int32_t>(0);
  const int64_t rows = shape.batch * shape.heads * shape.queries;
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(plan.team)
  {
    [[maybe_unused]] const typename Steps::Thread thread;
    Arena arena(scratch + common.used() + thread_index() * measure.used());
    const BackwardScratch buffers(plan, arena);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) row_delta(call, row, shared.delta);
    // In order, so that whoever waits waits for an item that a thread is working on.
    for (int64_t item = next++; item < plan.items; item = next++)
      backward_item<Steps>(call, item, shared, buffers);
  }
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

#include <new>
#include <thread>

#include "attention.h"
#include "attention_blocks.h"
#include "math.h"

// Floor: 10 heads queries keys width flops (half of it if causal) in five products, the two that
// the forward did among them, and one exponential a score: arithmetic bounds, as in the forward.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

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
void row_delta(const Call& call, int64_t index, float* delta) {
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

// The blocks of a (row block, head) pair.
template <typename Products>
void load_pair(const Call& call, int64_t batch, int64_t head, int64_t row, const float* delta,
               const BackwardScratch& s) {
  const AttentionShape& shape = call.inputs.shape;
  const int64_t rows = std::min(kBlockRows, shape.queries - row), stride = call.plan.sizes.stride;
  const Heads &q = call.inputs.q, &dout = call.results.dout;
  const auto load = [&](const Heads& x, float scale, float* pairs, float* out) {
    const void* data = at(x, shape.dtype, batch, head, row);
    int64_t row_stride = x.row_stride;
    if (Products::kPairs) {  // then memory is read once, and the rest comes from the cache
      Products::load_left(shape.dtype, data, row_stride, rows, shape.width, 1.0f, pairs, stride);
      data = pairs;
      row_stride = 2 * stride;
    }
    load_rows(shape.dtype, data, row_stride, rows, kBlockRows, shape.width, scale, out, stride);
  };
  load(q, shape.scale, s.query_pairs, s.queries);
  load(dout, 1.0f, s.dout_pairs, s.dout);
  const int64_t first = (batch * shape.heads + head) * shape.queries + row;
  for (int64_t i = 0; i < kBlockRows; ++i) {
    const float sum = i < rows ? call.results.row_sum[first + i] : 0.0f;
    s.inverses[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
    s.maxima[i] = i < rows ? call.results.row_maximum[first + i] : 0.0f;
    s.deltas[i] = i < rows ? delta[first + i] : 0.0f;
  }
}

// weights = exp(score - maximum) / sum, dscores = weights * (dout v^T - delta); 0 where masked.
template <typename Products>
void gradient_of_scores(const Call& call, const Limits& limits, const BackwardScratch& s) {
  using Left = typename Products::Left;
  const int64_t stride = call.plan.sizes.stride;
  const int64_t depth = Products::depth(call.inputs.shape.width);
  if (limits.biased)  // a mask may leave gaps between the strips that a column of tiles visits
    for (float* block : {s.weights, s.dscores}) std::fill_n(block, kBlockRows * kBlockKeys, 0.0f);
  score_tiles(Left{Products::kPairs ? s.query_pairs : s.queries, stride}, s.keys_t, depth, limits,
              [&](int64_t row, int64_t column, vr score, auto exact) {
                if (Products::kPairs) score *= splat_vr(call.inputs.shape.scale);
                if (limits.biased) score += load_vr(s.bias + row * kBlockKeys + column);
                vr weight = exp_nonpositive(score - splat_vr(s.maxima[row]));
                weight *= splat_vr(s.inverses[row]);
                if (!exact) weight = within(limits, row, column, weight, 0.0f);
                store(s.weights + row * kBlockKeys + column, weight);
              });
  if (!call.need_dscores()) return;
  score_tiles(Left{Products::kPairs ? s.dout_pairs : s.dout, stride}, s.values_t, depth, limits,
              [&](int64_t row, int64_t column, vr dweight, auto) {
                const int64_t index = row * kBlockKeys + column;
                store(s.dscores + index,
                      load_vr(s.weights + index) * (dweight - splat_vr(s.deltas[row])));
              });
}

// sums [kBlockKeys, stride] += left^T right: left [kBlockRows, kBlockKeys], right [kBlockRows,
// stride].
void add_transposed(const AttentionSizes& sizes, const Limits& limits, const float* left,
                    const float* right, float* sums) {
  over_columns(sizes.width, [&](auto vectors, int64_t column) {
    constexpr int kVectors = decltype(vectors)::value;
    int64_t first = 0, last = kStrips;
    for (int64_t key = 0; key < limits.columns; key += kTileRows) {
      // Only the strips of rows that see these keys.
      while (limits.widest[first] <= key) ++first;
      while (limits.widest[last - 1] <= key) --last;
      const int64_t row = first * kTileRows;
      float* target = sums + key * sizes.stride + column;
      tile<kVectors>(Columns{left + row * kBlockKeys + key, kBlockKeys},
                     right + row * sizes.stride + column, sizes.stride, last * kTileRows - row,
                     [&](int64_t i, int64_t j, vr product) {
                       float* sum = target + i * sizes.stride + j;
                       store(sum, load_vr(sum) + product);
                     });
    }
  });
}

// dq [kBlockRows, stride] += dscores keys; the first key block writes it.
void add_dq(const AttentionSizes& sizes, const Limits& limits, const BackwardScratch& s,
            bool first_block, float* dq) {
  if (first_block) std::fill_n(dq, kBlockRows * sizes.stride, 0.0f);
  over_columns(sizes.width, [&](auto vectors, int64_t column) {
    constexpr int kVectors = decltype(vectors)::value;
    for (int64_t strip = 0; strip < kStrips; ++strip) {
      if (limits.widest[strip] == 0) continue;
      const int64_t row = strip * kTileRows;
      tile<kVectors>(Rows{s.dscores + row * kBlockKeys, kBlockKeys}, s.keys + column, sizes.stride,
                     limits.widest[strip], [&](int64_t i, int64_t j, vr product) {
                       float* sum = dq + (row + i) * sizes.stride + column + j;
                       store(sum, load_vr(sum) + product);
                     });
    }
  });
}

// Where a unit's dq adds up, and whose turn it is at each of its (row block, head) pairs; progress
// is null where one thread takes all key blocks.
struct DqTarget {
  float* dq;                       // [row_blocks, group, kBlockRows, stride]
  std::atomic<int32_t>* progress;  // [row_blocks, group]
};

void wait_for(const std::atomic<int32_t>& counter, int64_t value) {
  for (int64_t spins = 0; counter.load(std::memory_order_acquire) < value; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

template <typename Products>
void load_key_block(const Call& call, int64_t batch, int64_t kv_head, int64_t key,
                    const BackwardScratch& s) {
  const AttentionShape& shape = call.inputs.shape;
  const AttentionSizes& sizes = call.plan.sizes;
  const int64_t keys = std::min(kBlockKeys, shape.keys - key);
  const Heads &k = call.inputs.k, &v = call.inputs.v;
  // Both pass through the buffer of the keys on their way to being transposed.
  Products::load_right(shape.dtype, at(v, shape.dtype, batch, kv_head, key), v.row_stride, keys,
                       shape.width, s.keys, sizes.stride, s.values_t);
  Products::load_right(shape.dtype, at(k, shape.dtype, batch, kv_head, key), k.row_stride, keys,
                       shape.width, s.keys, sizes.stride, s.keys_t);
  load_rows(shape.dtype, at(k, shape.dtype, batch, kv_head, key), k.row_stride, keys, kBlockKeys,
            shape.width, 1.0f, s.keys, sizes.stride);
  std::fill_n(s.dkeys, kBlockKeys * sizes.stride, 0.0f);
  std::fill_n(s.dvalues, kBlockKeys * sizes.stride, 0.0f);
}

template <typename Products>
void backward_block(const Call& call, int64_t unit, int64_t block, const float* delta,
                    const DqTarget& target, const BackwardScratch& s) {
  const AttentionShape& shape = call.inputs.shape;
  const AttentionSizes& sizes = call.plan.sizes;
  const int64_t batch = unit / shape.kv_heads, kv_head = unit % shape.kv_heads;
  const int64_t key = block * kBlockKeys;
  load_key_block<Products>(call, batch, kv_head, key, s);
  Limits limits;
  for (int64_t row_block = sizes.first_row_block(block); row_block < sizes.row_blocks;
       ++row_block) {
    const int64_t row = row_block * kBlockRows;
    for (int64_t member = 0; member < sizes.group; ++member) {
      const int64_t head = kv_head * sizes.group + member;
      if (member == 0 || call.inputs.mask.head_stride != 0)
        set_limits(call.inputs, batch, head, row, key, s.bias, limits);
      if (limits.columns > 0) {
        load_pair<Products>(call, batch, head, row, delta, s);
        gradient_of_scores<Products>(call, limits, s);
        if (call.need_dv()) add_transposed(sizes, limits, s.weights, s.dout, s.dvalues);
        if (call.need_dk()) add_transposed(sizes, limits, s.dscores, s.queries, s.dkeys);
      }
      if (!call.need_dq()) continue;
      const int64_t pair = row_block * sizes.group + member;
      float* dq = target.dq + pair * kBlockRows * sizes.stride;
      if (target.progress) wait_for(target.progress[pair], block);
      if (limits.columns > 0 || block == 0) add_dq(sizes, limits, s, block == 0, dq);
      if (block == sizes.visible(row_block) - 1)
        store_rows(
            shape.dtype, dq, sizes.stride, std::min(kBlockRows, shape.queries - row), shape.width,
            [&](int64_t) { return shape.scale; },
            at(call.gradients.dq, shape.dtype, batch, head, row), call.gradients.dq.row_stride);
      if (target.progress)
        target.progress[pair].store(static_cast<int32_t>(block + 1), std::memory_order_release);
    }
  }
  const int64_t keys = std::min(kBlockKeys, shape.keys - key);
  const auto store_block = [&](const MutableHeads& out, const float* sums) {
    if (out.data)
      store_rows(
          shape.dtype, sums, sizes.stride, keys, shape.width, [](int64_t) { return 1.0f; },
          at(out, shape.dtype, batch, kv_head, key), out.row_stride);
  };
  store_block(call.gradients.dk, s.dkeys);  // the scale came with the queries
  store_block(call.gradients.dv, s.dvalues);
}

template <typename Products>
void backward_item(Products, const Call& call, int64_t item, const BackwardShared& shared,
                   const BackwardScratch& s) {
  const BackwardPlan& plan = call.plan;
  const AttentionSizes& sizes = plan.sizes;
  if (item < plan.whole_units) {
    for (int64_t block = 0; block < sizes.key_blocks; ++block)
      backward_block<Products>(call, item, block, shared.delta, {s.dq, nullptr}, s);
    return;
  }
  const int64_t number = (item - plan.whole_units) / sizes.key_blocks;
  const int64_t block = (item - plan.whole_units) % sizes.key_blocks;
  const int64_t unit = plan.whole_units + number;
  const int64_t before = number - plan.shared_slots;  // who had this buffer
  if (before >= 0) wait_for(shared.done[plan.whole_units + before], sizes.key_blocks);
  const DqTarget target{shared.dq + number % plan.shared_slots * plan.dq_size,
                        shared.progress + unit * sizes.group * sizes.row_blocks};
  backward_block<Products>(call, unit, block, shared.delta, target, s);
  shared.done[unit].fetch_add(1, std::memory_order_acq_rel);
}

}  // namespace

void attention_backward(const AttentionInputs& inputs, const AttentionResults& results,
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
    Arena arena(scratch + common.used() + thread_index() * measure.used());
    const BackwardScratch buffers(plan, arena);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) row_delta(call, row, shared.delta);
    // In order, so that whoever waits waits for an item that a thread is working on.
    for (int64_t item = next++; item < plan.items; item = next++)
      with_products(shape.dtype,
                    [&](auto products) { backward_item(products, call, item, shared, buffers); });
  }
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

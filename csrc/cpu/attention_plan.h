// How the attention kernels cut their work into blocks and items, and their scratch memory. Plain
// arithmetic, the same in every build, so that the caller can ask for the size of the scratch.
#pragma once

#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "threads.h"

namespace fasttune::cpu {

// A block of scores is 32 KB in fp32, of queries or keys at width 64 half or all of that: what a
// product touches stays close to a first-level cache, and the sums over keys are read and written
// every 128 keys only.
constexpr int64_t kBlockRows = 64;  // queries of one head
constexpr int64_t kBlockKeys = 128;

inline int64_t divide_up(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Hands out pieces of one buffer of floats, aligned to 64 bytes; without a buffer it only measures.
class Arena {
 public:
  explicit Arena(float* buffer) : buffer_(buffer) {}
  float* take(int64_t count) {
    float* piece = buffer_ ? buffer_ + used_ : nullptr;
    used_ += padded_rank(count);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  float* buffer_;
  int64_t used_ = 0;
};

// What follows from the shape. A unit is one (batch, kv head): its keys and values serve `group`
// query heads.
struct AttentionSizes {
  explicit AttentionSizes(const AttentionShape& shape)
      : group(shape.heads / std::max<int64_t>(shape.kv_heads, 1)),
        units(shape.batch * shape.kv_heads),
        row_blocks(divide_up(shape.queries, kBlockRows)),
        key_blocks(divide_up(shape.keys, kBlockKeys)),
        width(padded_rank(shape.width)),
        // Rows of a power of two apart would fall into the same few sets of the first-level cache.
        stride(width >= 128 ? width + kLanes : width),
        causal(shape.causal) {}

  // Key blocks that queries of a row block may see.
  int64_t visible(int64_t row_block) const {
    return causal ? std::min(key_blocks, divide_up((row_block + 1) * kBlockRows, kBlockKeys))
                  : key_blocks;
  }
  // The first row block that sees a key block.
  int64_t first_row_block(int64_t key_block) const {
    return causal ? key_block * kBlockKeys / kBlockRows : 0;
  }

  int64_t group, units, row_blocks, key_blocks, width, stride;
  bool causal;
};

// Forward: an item is a run of (row block, head) pairs of one unit, which share the conversion of
// keys and values. Rows are independent, so how they are cut does not change the result.
struct ForwardPlan {
  ForwardPlan(const AttentionShape& shape, int threads) : sizes(shape) {
    const int64_t pairs = sizes.group * sizes.row_blocks;
    // About 200 KB each of queries and of sums; enough items to level out the causal triangle.
    const int64_t most = std::max<int64_t>(1, 768 / std::max<int64_t>(sizes.width, 1));
    const int64_t even = pairs * sizes.units / (4 * std::max(threads, 1));
    pairs_per_item = std::max<int64_t>(1, std::min({most, even, pairs}));
    items_per_unit = divide_up(pairs, pairs_per_item);
    items = items_per_unit * sizes.units;
    team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, items)));
  }
  AttentionSizes sizes;
  int64_t pairs_per_item, items_per_unit, items;
  int team;
};

// The sizes are those of fp32 operands. On tiles the same buffers hold bf16, features padded to 32
// instead of 16: no more bytes.
struct ForwardScratch {
  ForwardScratch(const ForwardPlan& plan, Arena& arena)
      : keys_t(arena.take(plan.sizes.width * kBlockKeys)),
        values(arena.take(kBlockKeys * plan.sizes.stride)),
        scores(arena.take(kBlockRows * kBlockKeys)),
        bias(arena.take(kBlockRows * kBlockKeys)),
        factors(arena.take(kBlockRows)),
        queries(arena.take(plan.pairs_per_item * kBlockRows * plan.sizes.stride)),
        sums(arena.take(plan.pairs_per_item * kBlockRows * plan.sizes.stride)),
        totals(arena.take(plan.pairs_per_item * kBlockRows * kLanes)),
        maxima(arena.take(plan.pairs_per_item * kBlockRows)) {}
  float* keys_t;   // [width, kBlockKeys]
  float* values;   // [kBlockKeys, stride]
  float* scores;   // [kBlockRows, kBlockKeys], then the exponentials
  float* bias;     // [kBlockRows, kBlockKeys]
  float* factors;  // [kBlockRows] of the running sums
  // Of each pair of the item:
  float* queries;  // [kBlockRows, stride], times the scale
  float* sums;     // [kBlockRows, stride], of exponentials times values
  float* totals;   // [kBlockRows, kLanes], partial sums of exponentials
  float* maxima;   // [kBlockRows]
};

// Backward: a key block of a unit walks the row blocks of all heads of its group, so that dk and dv
// have one fixed order; dq adds up over the key blocks, in ascending order too. While a whole unit
// fits a thread's cache and there is one for each thread, a thread takes all its key blocks.
// Otherwise threads take single key blocks, in order, and each waits for its turn at a row block.
struct BackwardPlan {
  BackwardPlan(const AttentionShape& shape, int threads) : sizes(shape) {
    threads = std::max(threads, 1);
    dq_size = sizes.group * sizes.row_blocks * kBlockRows * sizes.stride;
    constexpr int64_t kCached = 1 << 18;  // 1 MB
    const bool whole = threads == 1 || dq_size <= kCached;
    whole_units = whole ? sizes.units / threads * threads : 0;
    const int64_t shared = sizes.units - whole_units;
    items = whole_units + shared * sizes.key_blocks;
    team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, items)));
    // Units that can be under way together, and one that waits for its last key block.
    shared_slots = std::min(shared, 1 + divide_up(team, std::max<int64_t>(sizes.key_blocks, 1)));
  }
  AttentionSizes sizes;
  int64_t dq_size;      // floats of the dq of one unit
  int64_t whole_units;  // the first so many units are one item each, the others one a key block
  int64_t items, shared_slots;
  int team;
};

struct BackwardShared {
  BackwardShared(const AttentionShape& shape, const BackwardPlan& plan, Arena& arena)
      : delta(arena.take(shape.batch * shape.heads * shape.queries)),
        dq(arena.take(plan.shared_slots * plan.dq_size)),
        progress(reinterpret_cast<std::atomic<int32_t>*>(
            arena.take(plan.sizes.units * plan.sizes.group * plan.sizes.row_blocks))),
        done(reinterpret_cast<std::atomic<int32_t>*>(arena.take(plan.sizes.units))) {}
  float* delta;                    // [batch, heads, queries], rowsum(dout * out)
  float* dq;                       // [shared_slots, dq_size]
  std::atomic<int32_t>* progress;  // [units, row_blocks, group]: key blocks added to dq so far
  std::atomic<int32_t>* done;      // [units]: key blocks finished
};

struct BackwardScratch {
  BackwardScratch(const BackwardPlan& plan, Arena& arena)
      : keys(arena.take(kBlockKeys * plan.sizes.stride)),
        keys_t(arena.take(plan.sizes.width * kBlockKeys)),
        values_t(arena.take(plan.sizes.width * kBlockKeys)),
        dkeys(arena.take(kBlockKeys * plan.sizes.stride)),
        dvalues(arena.take(kBlockKeys * plan.sizes.stride)),
        queries(arena.take(kBlockRows * plan.sizes.stride)),
        dout(arena.take(kBlockRows * plan.sizes.stride)),
        query_pairs(arena.take(kBlockRows * plan.sizes.stride)),
        dout_pairs(arena.take(kBlockRows * plan.sizes.stride)),
        weights(arena.take(kBlockRows * kBlockKeys)),
        dscores(arena.take(kBlockRows * kBlockKeys)),
        bias(arena.take(kBlockRows * kBlockKeys)),
        maxima(arena.take(kBlockRows)),
        inverses(arena.take(kBlockRows)),
        deltas(arena.take(kBlockRows)),
        dq(arena.take(plan.whole_units ? plan.dq_size : 0)) {}
  float *keys, *keys_t, *values_t;    // of the key block: [kBlockKeys, stride], twice transposed
  float *dkeys, *dvalues;             // [kBlockKeys, stride]
  float *queries, *dout;              // of the row block: [kBlockRows, stride], queries times scale
  float *query_pairs, *dout_pairs;    // the same in pairs of bf16, where that is how to multiply
  float *weights, *dscores;           // P and dS [kBlockRows, kBlockKeys]
  float* bias;                        // [kBlockRows, kBlockKeys]
  float *maxima, *inverses, *deltas;  // [kBlockRows]
  float* dq;                          // of a whole unit: [row_blocks, group, kBlockRows, stride]
};

inline int64_t attention_forward_scratch(const AttentionShape& shape, int threads) {
  const ForwardPlan plan(shape, threads);
  Arena one(nullptr);
  ForwardScratch(plan, one);
  return plan.team * one.used();
}

inline int64_t attention_backward_scratch(const AttentionShape& shape, int threads) {
  const BackwardPlan plan(shape, threads);
  Arena shared(nullptr), one(nullptr);
  BackwardShared(shape, plan, shared);
  BackwardScratch(plan, one);
  return shared.used() + plan.team * one.used();
}

}  // namespace fasttune::cpu

#include "attention.h"
#include "attention_forward_steps.h"

// Floor: 4 heads queries keys width flops (half of it if causal), one exponential a score, and each
// of q, k, v read and out written once. At width 64 a score costs 16 16-lane FMAs for its two
// products and about one sixteenth of twelve instructions for its exponential: arithmetic bounds.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

template <typename Products>
struct VectorForward {
  struct Thread {};

  static void load_queries(const AttentionInputs& inputs, const AttentionSizes& sizes,
                           int64_t batch, const Pair& pair) {
    const AttentionShape& shape = inputs.shape;
    Products::load_left(shape.dtype, at(inputs.q, shape.dtype, batch, pair.head, pair.row),
                        inputs.q.row_stride, pair.rows, shape.width, shape.scale, pair.queries,
                        sizes.stride);
  }

  static void load_keys(const AttentionInputs& inputs, const AttentionSizes& sizes, int64_t batch,
                        int64_t kv_head, int64_t key, int64_t keys, const ForwardScratch& s) {
    const AttentionShape& shape = inputs.shape;
    // The keys pass through the buffer of the values on their way to being transposed.
    Products::load_right(shape.dtype, at(inputs.k, shape.dtype, batch, kv_head, key),
                         inputs.k.row_stride, keys, shape.width, s.values, sizes.stride, s.keys_t);
    load_rows(shape.dtype, at(inputs.v, shape.dtype, batch, kv_head, key), inputs.v.row_stride,
              keys, kBlockKeys, shape.width, 1.0f, s.values, sizes.stride);
  }

  static void scores(const AttentionShape& shape, const AttentionSizes& sizes, const Limits& limits,
                     const Pair& pair, const ForwardScratch& s) {
    score_tiles(typename Products::Left{pair.queries, sizes.stride}, s.keys_t,
                Products::depth(shape.width), limits,
                [&](int64_t row, int64_t column, vr score, auto exact) {
                  if (Products::kPairs) score *= splat_vr(shape.scale);
                  if (limits.biased) score += load_vr(s.bias + row * kBlockKeys + column);
                  if (!exact) score = within(limits, row, column, score, -kInfinity);
                  store(s.scores + row * kBlockKeys + column, score);
                });
  }

  static void add_values(const AttentionSizes& sizes, const Limits& limits, const Pair& pair,
                         const ForwardScratch& s) {
    over_columns(sizes.width, [&](auto vectors, int64_t column) {
      constexpr int kVectors = decltype(vectors)::value;
      for (int64_t strip = 0; strip < kStrips; ++strip) {
        if (limits.widest[strip] == 0) continue;
        const int64_t row = strip * kTileRows;
        float* sums = pair.sums + row * sizes.stride + column;
        tile<kVectors>(Rows{s.scores + row * kBlockKeys, kBlockKeys}, s.values + column,
                       sizes.stride, limits.widest[strip], [&](int64_t i, int64_t j, vr product) {
                         float* sum = sums + i * sizes.stride + j;
                         store(sum, load_vr(sum) * splat_vr(s.factors[row + i]) + product);
                       });
      }
    });
  }
};

}  // namespace

void attention_forward(const AttentionInputs& inputs, const MutableHeads& out, float* row_maximum,
                       float* row_sum, float* scratch, int threads) {
  with_products(inputs.shape.dtype, [&](auto products) {
    forward<VectorForward<decltype(products)>>(inputs, out, row_maximum, row_sum, scratch, threads);
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

#include "attention.h"
#include "attention_backward_steps.h"

// Floor: 10 heads queries keys width flops (half of it if causal) in five products, the two that
// the forward did among them, and one exponential a score: arithmetic bounds, as in the forward.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

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

template <typename Products>
struct VectorBackward {
  struct Thread {};
  static constexpr bool kScaled = true;

  static void load_keys(const Call& call, int64_t batch, int64_t kv_head, int64_t key,
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
  }

  // The blocks of a (row block, head) pair.
  static void load_pair(const Call& call, int64_t batch, int64_t head, int64_t row,
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
  }
  // weights = exp(score - maximum) / sum, dscores = weights * (dout v^T - delta); 0 where masked.
  static void gradient_of_scores(const Call& call, const Limits& limits, const BackwardScratch& s) {
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

  static void add_keys(const Call& call, const Limits& limits, const BackwardScratch& s) {
    gradient_of_scores(call, limits, s);
    const AttentionSizes& sizes = call.plan.sizes;
    if (call.need_dv()) add_transposed(sizes, limits, s.weights, s.dout, s.dvalues);
    if (call.need_dk()) add_transposed(sizes, limits, s.dscores, s.queries, s.dkeys);
  }

  // dq [kBlockRows, stride] += dscores keys.
  static void add_dq(const AttentionSizes& sizes, const Limits& limits, const BackwardScratch& s,
                     float* dq) {
    over_columns(sizes.width, [&](auto vectors, int64_t column) {
      constexpr int kVectors = decltype(vectors)::value;
      for (int64_t strip = 0; strip < kStrips; ++strip) {
        if (limits.widest[strip] == 0) continue;
        const int64_t row = strip * kTileRows;
        tile<kVectors>(Rows{s.dscores + row * kBlockKeys, kBlockKeys}, s.keys + column,
                       sizes.stride, limits.widest[strip], [&](int64_t i, int64_t j, vr product) {
                         float* sum = dq + (row + i) * sizes.stride + column + j;
                         store(sum, load_vr(sum) + product);
                       });
      }
    });
  }

  static void store_dq(const Call& call, int64_t batch, int64_t head, int64_t row,
                       const float* dq) {
    const AttentionShape& shape = call.inputs.shape;
    store_rows(
        shape.dtype, dq, call.plan.sizes.stride, std::min(kBlockRows, shape.queries - row),
        shape.width, [&](int64_t) { return shape.scale; },
        at(call.gradients.dq, shape.dtype, batch, head, row), call.gradients.dq.row_stride);
  }
};

}  // namespace

void attention_backward(const AttentionInputs& inputs, const AttentionResults& results,
                        const AttentionGradients& gradients, float* scratch, int threads) {
  with_products(inputs.shape.dtype, [&](auto products) {
    backward<VectorBackward<decltype(products)>>(inputs, results, gradients, scratch, threads);
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

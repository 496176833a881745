#include "amx/attention_products.h"
#include "attention.h"
#include "attention_forward_steps.h"

// Floor: the products take three tile products of 16 cycles for 16 x 16 x 32 multiply-adds of two
// matrices, a tenth of the cycles of fp32 multiply-adds; the exponentials are as many as before and
// bound what is left.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

struct TileForward {
  using Thread = UseTiles;

  static void load_queries(const AttentionInputs& inputs, const AttentionSizes&, int64_t batch,
                           const Pair& pair) {
    copy_rows(stored(inputs.q, inputs.shape, batch, pair.head, pair.row, pair.rows), kBlockRows,
              halves(pair.queries));
  }

  static void load_keys(const AttentionInputs& inputs, const AttentionSizes&, int64_t batch,
                        int64_t kv_head, int64_t key, int64_t keys, const ForwardScratch& s) {
    interleave_transposed(stored(inputs.k, inputs.shape, batch, kv_head, key, keys), kBlockKeys,
                          halves(s.keys_t));
    interleave(stored(inputs.v, inputs.shape, batch, kv_head, key, keys), kBlockKeys,
               halves(s.values));
  }

  static void scores(const AttentionShape& shape, const AttentionSizes&, const Limits& limits,
                     const Pair& pair, const ForwardScratch& s) {
    for (int64_t row = 0; row < kBlockRows; row += kPair)
      for (int64_t key = 0; key < widest(limits, row, kPair); key += kPair)
        multiply_block(halves(pair.queries), padded_depth(shape.width), halves(s.keys_t),
                       kBlockKeys / kTileSide, row, key, s.scores, kBlockKeys);
    for (int64_t row = 0; row < kBlockRows; ++row) {
      const int64_t strip = row / kTileRows;
      float* score = s.scores + row * kBlockKeys;
      for (int64_t j = 0; j < limits.widest[strip]; j += kLanes) {
        vf value = load(score + j) * splat(shape.scale);
        if (limits.biased) value += load(s.bias + row * kBlockKeys + j);
        if (limits.narrowest[strip] < j + kLanes) value = within(limits, row, j, value, -kInfinity);
        store(score + j, value);
      }
    }
  }

  static void add_values(const AttentionSizes& sizes, const Limits& limits, const Pair& pair,
                         const ForwardScratch& s) {
    for (int64_t row = 0; row < kBlockRows; row += kTileSide) {
      const int64_t keys = widest(limits, row, kTileSide);
      if (keys == 0) continue;
      for (int64_t i = row; i < row + kTileSide; ++i)
        to_terms<kBlockKeys>(s.scores + i * kBlockKeys, limits.widest[i / kTileRows]);
      multiply_rows_of_terms<kBlockKeys>(
          s.scores + row * kBlockKeys, 0, divide_up(keys, kTileDepth), halves(s.values),
          sizes.width / kLanes, [&](int64_t i, int64_t column, vf product) {
            float* sum = pair.sums + (row + i) * sizes.stride + column;
            store(sum, load(sum) * splat(s.factors[row + i]) + product);
          });
    }
  }

 private:
  static int64_t widest(const Limits& limits, int64_t row, int64_t rows) {
    const int32_t* strips = limits.widest + row / kTileRows;
    return *std::max_element(strips, strips + rows / kTileRows);
  }
};

}  // namespace

void attention_forward(const AttentionInputs& inputs, const MutableHeads& out, float* row_maximum,
                       float* row_sum, float* scratch, int threads) {
  if (inputs.shape.dtype != DType::kBFloat16)
    return avx512::table().attention_forward(inputs, out, row_maximum, row_sum, scratch, threads);
  forward<TileForward>(inputs, out, row_maximum, row_sum, scratch, threads);
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

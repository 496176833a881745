#include "amx/attention_products.h"
#include "attention.h"
#include "attention_backward_steps.h"

// Scores and their gradients are formed transposed, [keys, queries]: so they are left operands of
// the sums for dk and dv as they lie, and of those for dq, which stays transposed until it is
// stored, the right one by interleaving rows. Only queries and dout are transposed, 16 x 16 at a
// time, once a pair of blocks.
//
// Floor: eight tile products for 16 x 16 x 32 multiply-adds of five matrices; the exponentials and
// the terms bound what is left.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

constexpr int64_t kQueryTiles = kBlockRows / kTileSide;
constexpr int64_t kKeySteps = kBlockKeys / kTileDepth;
constexpr int64_t kQuerySteps = kBlockRows / kTileDepth;

// Whether a query of a run of 32 sees a key of a run of 32.
struct Seen {
  explicit Seen(const Limits& limits) {
    constexpr int64_t kStripsOfRun = kTileDepth / kTileRows;
    for (int64_t query = 0; query < kQuerySteps; ++query) {
      const int32_t* strips = limits.widest + query * kStripsOfRun;
      const int64_t widest = *std::max_element(strips, strips + kStripsOfRun);
      for (int64_t key = 0; key < kKeySteps; ++key) of_run[key][query] = widest > key * kTileDepth;
    }
  }
  bool of_run[kKeySteps][kQuerySteps];
};

struct TileBackward {
  using Thread = UseTiles;
  static constexpr bool kScaled = false;
  static constexpr int64_t kLargestWidth = 256;

  static void load_keys(const Call& call, int64_t batch, int64_t kv_head, int64_t key,
                        const BackwardScratch& s) {
    const AttentionShape& shape = call.inputs.shape;
    const int64_t keys = std::min(kBlockKeys, shape.keys - key);
    const StoredRows k = stored(call.inputs.k, shape, batch, kv_head, key, keys);
    copy_rows(k, kBlockKeys, halves(s.keys));
    copy_rows(stored(call.inputs.v, shape, batch, kv_head, key, keys), kBlockKeys,
              halves(s.values_t));
    // k^T as a left operand, tiles [step of 32 keys, tile of 16 features].
    uint16_t* tiles = halves(s.keys_t);
    interleave(k, kBlockKeys, tiles);
    const int64_t count = kKeySteps * call.plan.sizes.width / kLanes;
    for (int64_t tile = 0; tile < count; ++tile, tiles += kTileElements)
      transpose_16(reinterpret_cast<float*>(tiles), kLanes, reinterpret_cast<float*>(tiles),
                   kLanes);
  }

  static void load_pair(const Call& call, int64_t batch, int64_t head, int64_t row,
                        const BackwardScratch& s) {
    const AttentionShape& shape = call.inputs.shape;
    const int64_t rows = std::min(kBlockRows, shape.queries - row);
    const StoredRows q = stored(call.inputs.q, shape, batch, head, row, rows);
    const StoredRows dout = stored(call.results.dout, shape, batch, head, row, rows);
    interleave_transposed(q, kBlockRows, halves(s.query_pairs));
    interleave_transposed(dout, kBlockRows, halves(s.dout_pairs));
    interleave(q, kBlockRows, halves(s.queries));
    interleave(dout, kBlockRows, halves(s.dout));
  }

  static void add_keys(const Call& call, const Limits& limits, const BackwardScratch& s) {
    const AttentionSizes& sizes = call.plan.sizes;
    const Seen seen(limits);
    weights_of_keys(call, limits, seen, s);
    if (call.need_dscores()) gradients_of_scores(call, seen, s);
    if (call.need_dv()) add_rows(sizes, seen, s.weights, s.dout, s.dvalues);
    if (call.need_dq()) interleave_gradients(s);
    if (call.need_dk()) add_rows(sizes, seen, s.dscores, s.queries, s.dkeys);
  }

  // dq^T [width, kBlockRows] += keys^T dscores.
  static void add_dq(const AttentionSizes& sizes, const Limits& limits, const BackwardScratch& s,
                     float* dq) {
    const Seen seen(limits);
    alignas(64) float results[kTileSide * kBlockRows];
    const int64_t features = sizes.width / kLanes;
    for (int64_t feature = 0; feature < features; ++feature) {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      for (int64_t step = 0; step < kKeySteps; ++step) {
        const uint16_t* right = halves(s.weights) + step * kQueryTiles * kTileElements;
        tile_load<4>(halves(s.keys_t) + (step * features + feature) * kTileElements, kTileRowBytes);
        if (seen.of_run[step][0]) multiply_both<0>(right), multiply_both<1>(right);
        if (seen.of_run[step][1]) multiply_both<2>(right), multiply_both<3>(right);
      }
      constexpr int64_t kBytes = 4 * kBlockRows;
      tile_store<0>(results, kBytes), tile_store<1>(results + kLanes, kBytes);
      tile_store<2>(results + 2 * kLanes, kBytes), tile_store<3>(results + 3 * kLanes, kBytes);
      float* sums = dq + feature * kTileSide * kBlockRows;
      for (int64_t j = 0; j < kTileSide * kBlockRows; j += kLanes)
        store(sums + j, load(sums + j) + load(results + j));
    }
  }

  static void store_dq(const Call& call, int64_t batch, int64_t head, int64_t row,
                       const float* dq) {
    const AttentionShape& shape = call.inputs.shape;
    const int64_t rows = std::min(kBlockRows, shape.queries - row), width = call.plan.sizes.width;
    alignas(64) float block[kTileSide * kLargestWidth];
    for (int64_t first = 0; first < rows; first += kTileSide) {
      for (int64_t feature = 0; feature < width; feature += kTileSide)
        transpose_16(dq + feature * kBlockRows + first, kBlockRows, block + feature, width);
      store_rows(
          shape.dtype, block, width, std::min(kTileSide, rows - first), shape.width,
          [&](int64_t) { return shape.scale; },
          at(call.gradients.dq, shape.dtype, batch, head, row + first),
          call.gradients.dq.row_stride);
    }
  }

 private:
  // finish(key, query, 16 lanes) over the keys and queries that may see each other; the others of
  // out [kBlockKeys, kBlockRows] become zero.
  template <typename Finish>
  static void products_of_keys(const Call& call, const Seen& seen, const uint16_t* left,
                               const uint16_t* right, float* out, Finish&& finish) {
    const int64_t depth = padded_depth(call.inputs.shape.width);
    for (int64_t key = 0; key < kBlockKeys; key += kPair)
      for (int64_t query = 0; query < kBlockRows; query += kPair) {
        if (seen.of_run[key / kPair][query / kPair]) {
          multiply_block(left, depth, right, kQueryTiles, key, query, out, kBlockRows);
          for (int64_t half = query; half < query + kPair; half += kTileSide)
            for (int64_t i = key; i < key + kPair; i += kTileSide) finish(i, half);
        } else {
          for (int64_t i = key; i < key + kPair; ++i)
            std::fill_n(out + i * kBlockRows + query, kPair, 0.0f);
        }
      }
  }

  // weights [kBlockKeys, kBlockRows] = exp(score - maximum) / sum; 0 where masked.
  static void weights_of_keys(const Call& call, const Limits& limits, const Seen& seen,
                              const BackwardScratch& s) {
    const vf scale = splat(call.inputs.shape.scale);
    alignas(64) float bias[kTileSide * kLanes] = {};
    products_of_keys(call, seen, halves(s.keys), halves(s.query_pairs), s.weights,
                     [&](int64_t key, int64_t row) {
                       const vf maxima = load(s.maxima + row), inverses = load(s.inverses + row);
                       vi limit;
                       std::memcpy(&limit, limits.of_row + row, sizeof limit);
                       if (limits.biased)
                         transpose_16(s.bias + row * kBlockKeys + key, kBlockKeys, bias, kLanes);
                       for (int64_t i = 0; i < kTileSide; ++i) {
                         float* place = s.weights + (key + i) * kBlockRows + row;
                         vf score = load(place) * scale;
                         if (limits.biased) score += load(bias + i * kLanes);
                         const vf weight = exp_nonpositive(score - maxima) * inverses;
                         store(place, select(limit > static_cast<int32_t>(key + i), weight, vf{}));
                       }
                     });
  }

  // dscores [kBlockKeys, kBlockRows] = weights * (v dout^T - delta).
  static void gradients_of_scores(const Call& call, const Seen& seen, const BackwardScratch& s) {
    products_of_keys(call, seen, halves(s.values_t), halves(s.dout_pairs), s.dscores,
                     [&](int64_t key, int64_t row) {
                       const vf deltas = load(s.deltas + row);
                       for (int64_t i = key; i < key + kTileSide; ++i) {
                         float* place = s.dscores + i * kBlockRows + row;
                         store(place,
                               load(s.weights + i * kBlockRows + row) * (load(place) - deltas));
                       }
                     });
  }

  // sums [kBlockKeys, stride] += left right, left [kBlockKeys, kBlockRows], which becomes terms.
  static void add_rows(const AttentionSizes& sizes, const Seen& seen, float* left, float* right,
                       float* sums) {
    for (int64_t key = 0; key < kBlockKeys; key += kTileSide) {
      const bool* runs = seen.of_run[key / kTileDepth];
      const int64_t first = runs[0] ? 0 : 1, steps = runs[1] ? 2 : 1;
      if (!runs[0] && !runs[1]) continue;
      for (int64_t i = key; i < key + kTileSide; ++i)
        to_terms<kBlockRows>(left + i * kBlockRows, kBlockRows);
      multiply_rows_of_terms<kBlockRows>(left + key * kBlockRows, first, steps, halves(right),
                                         sizes.width / kLanes,
                                         [&](int64_t i, int64_t column, vf product) {
                                           float* sum = sums + (key + i) * sizes.stride + column;
                                           store(sum, load(sum) + product);
                                         });
    }
  }

  // The gradients of the scores as a right operand, two terms [step of 32 keys, tile of queries],
  // where the weights were, which are no longer needed.
  static void interleave_gradients(const BackwardScratch& s) {
    constexpr int64_t kTerm = kKeySteps * kQueryTiles * kTileElements;
    for (int64_t key = 0; key < kBlockKeys; key += 2)
      for (int64_t tile = 0; tile < kQueryTiles; ++tile) {
        const float* row = s.dscores + key * kBlockRows + tile * kLanes;
        const vf a = load(row), b = load(row + kBlockRows);
        const vu a1 = as_bits(a) & 0xffff0000u, b1 = as_bits(b) & 0xffff0000u;
        const vu a2 = as_bits(a - as_float(a1)) + 0x8000u;
        const vu b2 = (as_bits(b - as_float(b1)) + 0x8000u) & 0xffff0000u;
        uint16_t* to = halves(s.weights) + (key / kTileDepth * kQueryTiles + tile) * kTileElements +
                       key % kTileDepth / 2 * kTileDepth;
        store_pairs(to, pair(a1, b1));
        store_pairs(to + kTerm, pair(a2, b2));
      }
  }

  template <int Q>
  static void multiply_both(const uint16_t* right) {
    constexpr int64_t kTerm = kKeySteps * kQueryTiles * kTileElements;
    tile_load<6>(right + Q * kTileElements, kTileRowBytes);
    tile_load<7>(right + kTerm + Q * kTileElements, kTileRowBytes);
    tile_dot<Q, 4, 6>(), tile_dot<Q, 4, 7>();
  }
};

}  // namespace

void attention_backward(const AttentionInputs& inputs, const AttentionResults& results,
                        const AttentionGradients& gradients, float* scratch, int threads) {
  if (inputs.shape.dtype != DType::kBFloat16 || inputs.shape.width > TileBackward::kLargestWidth)
    return avx512::table().attention_backward(inputs, results, gradients, scratch, threads);
  backward<TileBackward>(inputs, results, gradients, scratch, threads);
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

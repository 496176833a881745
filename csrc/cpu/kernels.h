// Every CPU kernel, as a table of functions: each build (AMX, AVX-512, AVX2, plain) fills one.
//
// Legend: M rows (tokens), K input features, N output features, R rank, V vocabulary, H features
// that a norm spans; in rope B batch, S positions, D features of a head, of which R rotate. Strides
// are in elements; the last dimension always has stride 1. `threads` is an upper bound.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/adamw.h"
#include "common/dtype.h"
#include "common/philox.h"

namespace fasttune::cpu {

struct Matrix {
  const void* data;
  int64_t rows, cols, stride;
  DType dtype;
};

struct MutableMatrix {
  void* data;
  int64_t rows, cols, stride;
  DType dtype;
};

// What lora_expand adds before it rounds; null pointers where absent.
struct ExpandTerms {
  const Matrix* addend;       // [M, N], fp32 or of the dtype of the output
  const float* addend_scale;  // [N] fp32
  const float* bias;          // [N] fp32
};

// What base_product multiplies x w by, and where it leaves it before, in fp32 or bf16.
struct ScaledProduct {
  const float* scale;        // [N]
  const MutableMatrix* out;  // [M, N] or null
};

// A lora_reduce of x that base_product makes on the way.
struct Reduction {
  const float* panel;  // [K, padded_rank(R)]
  float scale;
  Dropout dropout;  // of x
  float* out;       // [M, R]
};

// Rows [first, end) of base_product's x, and LoRA's branch of them: keep * (t panel). Dropout, also
// that of the reduction, counts the rows of the run.
struct Run {
  int64_t first, end;
  const float* t;              // [end - first, R]
  const Reduction* reduction;  // that makes t, or null
  const float* panel;          // [R, N]
  int64_t rank;                // may be 0
  const float* bias;           // [N] or null
  Dropout dropout;
};

// A bottleneck adapter: x [M, K], D [R, K], U [H, R], R <= kMaxRank. All in fp32, with R a multiple
// of kLanes, weights without gaps and no dropout; or, in builds with tiles, in bf16 or fp32 with
// any R and dropout.
struct Bottleneck {
  const Matrix &x, &down, &up;
  const Matrix* down_bias;  // [1, R] or null, of any dtype
  int activation;           // an Activation, or negative: none
  float factor;             // of what is added, with the scale of what is kept
  Dropout dropout;          // of that, [M, H]
};

// What the backward of an adapter computes; null where it is not wanted. The biases are [1, R] and
// [1, H].
struct BottleneckGradients {
  const MutableMatrix *dx, *down, *down_bias, *up, *up_bias;
};

struct RowLossOptions {
  int64_t ignore_index;
  float logit_scale;
  float softcap;          // 0: none
  float label_smoothing;  // epsilon
  float z_loss;
  bool need_grad;
};

struct RowLossOutputs {
  float* loss;          // [C]
  float* correct;       // [C] or null
  float* entropy;       // [C] or null
  float* exponentials;  // room for [threads, V] if a gradient is needed
};

// [batch, heads, positions, width] with unit stride in width; no data where absent.
struct Heads {
  const void* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct MutableHeads {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

enum class MaskKind : int { kNone = 0, kBool = 1, kAdditive = 2 };

// [batch, heads, queries, keys] with any strides, zero where it is broadcast. kBool: one byte each,
// nonzero to attend.
struct AttentionMask {
  const void* data;
  int64_t batch_stride, head_stride, row_stride, key_stride;
  MaskKind kind;
  DType dtype;  // of an additive mask
};

// Query head h reads kv head h / (heads / kv_heads). causal: query i sees the keys 0 ... i.
struct AttentionShape {
  int64_t batch, heads, kv_heads, queries, keys, width;
  DType dtype;  // of q, k, v, their gradients, and the output
  float scale;
  bool causal;
};

struct AttentionInputs {
  AttentionShape shape;
  Heads q, k, v;
  AttentionMask mask;
};

// What the forward left, and the gradient of its output.
struct AttentionResults {
  Heads out, dout;
  const float* row_maximum;  // [batch, heads, queries]
  const float* row_sum;
};

struct AttentionGradients {
  MutableHeads dq, dk, dv;
};

// One tensor [B, heads, S, D] to rotate: x is read, y is written; they do not overlap.
struct RopeOperand {
  const void* x;
  void* y;
  int64_t heads;
  int64_t x_batch, x_head, x_position;  // strides
  int64_t y_batch, y_head, y_position;
  DType dtype;
};

// cos and sin [B, S, R]; a batch stride of 0 shares one row of them.
struct RopeTables {
  const void* cos;
  const void* sin;
  int64_t cos_batch, cos_position, sin_batch, sin_position;  // strides
  DType dtype;
};

struct RopeShape {
  int64_t batch, positions, features, rotary;  // B, S, D, R
  bool interleaved;                            // pairs (2i, 2i + 1) instead of (i, i + R / 2)
  bool transposed;                             // the backward
};

// The scale of a norm, offset + weight (1 where data is null), or its bias (0).
struct NormVector {
  const void* data;  // [H] or null
  DType dtype;
  float offset;
  float* buffer;  // [H], where the fp32 values go
};

// A sum over the rows in fixed order: each of `chunks` equal parts of the rows into a row of
// `partial`, then these one after the other.
struct ColumnSums {
  float* out;      // [H], null: not wanted
  float* partial;  // [chunks, H], overwritten
  int64_t chunks;  // how the rows are shared out, also where no sum is wanted
};

// What all tensors of a call share.
struct AdamWCall {
  DType param_dtype, grad_dtype;
  Moments moments;
  Rounding rounding;
  float grad_factor;  // unscales, clips, and has the sign of the direction
  uint64_t seed;
};

// What the forward and the backward of an edit of listed rows share: P entries in the list, rank R,
// H features. rotation and source are [R, stride] fp32, zero from H to padded_rank(H).
struct ReftCall {
  const int64_t* rows;  // [P], negative: none; null: entry p is row p
  int64_t count, rank, stride;
  const float* rotation;
  const float* source;
  const float* bias;  // [R] or null
  bool difference;
  int activation;   // an Activation, or negative: none
  Dropout dropout;  // of element (p, k)
  float scale;      // of what is kept
};

struct Kernels {
  const char* isa;

  // dst = src, rounded to nearest even.
  void (*convert)(const Matrix& src, const MutableMatrix& dst, int threads);

  // dst [N, stride] fp32 = src^T of src [M, N], with zeros in the columns from M on.
  void (*transpose)(const Matrix& src, float* dst, int64_t stride, int threads);

  // out [M, R] fp32 = scale * (x * keep) panel, with panel [K, padded_rank(R)] fp32, zero padded.
  void (*lora_reduce)(const Matrix& x, const float* panel, int64_t rank, float scale,
                      const Dropout& dropout, float* out, int threads);

  // out[k, r] = sum_m (x * keep)[m, k] t[m, r], with t [M, padded_rank(R)] fp32, zero padded.
  // Written as [K, R], or as [R, K] if transposed. Each output has one fixed summation order.
  void (*lora_outer)(const Matrix& x, const float* t, int64_t rank, const Dropout& dropout,
                     const MutableMatrix& out, bool transposed, int threads);

  // bits [M, ceil(K / 64)]: which elements of [M, K] are kept, bit i of a word the i-th of its 64.
  void (*draw)(const Dropout& dropout, int64_t rows, int64_t cols, uint64_t* bits, int threads);

  // out [M, K] = x * keep; x and out may be the same.
  void (*drop)(const Matrix& x, const Dropout& dropout, const MutableMatrix& out, int threads);
  // out [M, N] = addend addend_scale + bias + keep * (t panel), with t [M, R] fp32 and panel [R, N]
  // fp32.
  void (*lora_expand)(const float* t, const float* panel, int64_t rank, const ExpandTerms& terms,
                      const Dropout& dropout, const MutableMatrix& out, int threads);

  // The rows of out [M, N], fp32 or bf16, that `count` runs name = lora_expand's + x w, rounded
  // once: x [M, K] bf16, w bf16 [K, N] or, if transposed, [N, K]. addend [M, N], of the dtype of
  // out or fp32, and product may be null. Null in builds whose products the vendor library's beat.
  void (*base_product)(const Matrix& x, const Matrix& w, bool transposed, const Run* runs,
                       int64_t count, const Matrix* addend, const ScaledProduct* product,
                       const MutableMatrix& out, int threads);
  // out [M, N] fp32 = x w, of base_product's operands, for a K of many thousands; partial is fp32
  // [kDeepSums - 1, M, N]. Null as above.
  void (*deep_product)(const Matrix& x, const Matrix& w, bool transposed, const MutableMatrix& out,
                       float* partial, int threads);

  // z [M, R] = x D^T + b_D and y [M, H] = residual + keep * factor scale (act(z) U^T + b_U),
  // rounded once; residual, of y's dtype or fp32, up_bias and scale [1, H] of any dtype or null.
  // z has x's dtype. False, with results that mean nothing, if a value was not finite and has no
  // terms; the same for the backward.
  bool (*bottleneck_forward)(const Bottleneck& adapter, const Matrix* residual,
                             const Matrix* up_bias, const Matrix* scale, const MutableMatrix& z,
                             const MutableMatrix& y, int threads);
  // With dz = factor (keep * dy) U act'(z): dx = addend + dz D, dD = dz^T x, dU = outer_factor
  // (keep * dy)^T act(z), and the sums over the rows. dy and z have x's dtype.
  bool (*bottleneck_backward)(const Bottleneck& adapter, const Matrix& dy, const Matrix& z,
                              const Matrix* addend, float outer_factor,
                              const BottleneckGradients& gradients, int threads);

  // out [M, N] = addend + keep * x scale column_scale, with addend and column_scale [N] fp32 or
  // null.
  void (*scaled_sum)(const Matrix& x, const Matrix* addend, const float* column_scale, float scale,
                     const Dropout& dropout, const MutableMatrix& out, int threads);

  // dx [M, N] = dy scale in the dtype of dy, or null, and dscale [N] = sum_m dy x; scale [N] fp32.
  void (*ia3_scale_backward)(const Matrix& dy, const Matrix& x, const float* scale,
                             const MutableMatrix* dx, const ColumnSums& dscale, int threads);

  // out [N] = the root of |w_n|^2 + scale <b_n, 2 w_n panel + through_n>, or 0 where that is
  // negative: w [N, K], panel as above, b and through [N, R] fp32. On the way product [M, N] = x
  // w^T, of any dtype, for a few rows of x [M, K], or null: padded_rank(R) + M <= kMaxRank.
  void (*row_norms)(const Matrix& w, const float* panel, int64_t rank, const float* b,
                    const float* through, float scale, float* out, const Matrix* x,
                    const MutableMatrix* product, int threads);

  // y [M, I] = act(gate) * up * scale, scale [I] fp32. Operands of one dtype are the fast case.
  void (*scaled_glu_forward)(const Matrix& gate, const Matrix& up, const float* scale,
                             const MutableMatrix& y, Activation activation, int threads);

  // dgate [M, I] = dy * scale * up * act'(gate), dup [M, I] = dy * scale * act(gate), either with
  // null data where not wanted; dscale [I] = sum_m dy * act(gate) * up. All matrices have one
  // dtype.
  void (*scaled_glu_backward)(const Matrix& dy, const Matrix& gate, const Matrix& up,
                              const float* scale, const MutableMatrix& dgate,
                              const MutableMatrix& dup, const ColumnSums& dscale,
                              Activation activation, int threads);

  // The listed rows of y [M, H] = keep scale (h + d rotation), with z = h source^T + bias and d =
  // act(z) - h rotation^T (without it unless difference), both [P, R], zero for no row. x [P, H],
  // the rows of h as listed, zero for no row, may be null. y may be h.
  void (*reft_forward)(const Matrix& h, const ReftCall& call, const MutableMatrix& y,
                       const MutableMatrix* x, float* z, float* d, int threads);

  // With keep scale dy in place of dy: dd = dy rotation^T and dz = dd act'(z), both [P, R], and the
  // listed rows of dh [M, H] = dy + dz source - dd rotation (without it unless difference). g [P,
  // H], the rows of dy as listed, without the mask, and dh may be null.
  void (*reft_backward)(const Matrix& dy, const ReftCall& call, const float* z,
                        const MutableMatrix* dh, const MutableMatrix* g, float* dz, float* dd,
                        int threads);

  // The loss of each row of logits [C, V]; with need_grad the row becomes its gradient.
  void (*cross_entropy_rows)(const MutableMatrix& logits, const int64_t* targets,
                             const RowLossOptions& options, const RowLossOutputs& outputs,
                             int threads);

  // y [M, I] = act(gate) * up. Operands of one dtype are the fast case.
  void (*glu_forward)(const Matrix& gate, const Matrix& up, const MutableMatrix& y,
                      Activation activation, int threads);

  // dgate [M, I] = dy * up * act'(gate), dup [M, I] = dy * act(gate); one with null data is not
  // written.
  void (*glu_backward)(const Matrix& dy, const Matrix& gate, const Matrix& up,
                       const MutableMatrix& dgate, const MutableMatrix& dup, Activation activation,
                       int threads);

  // y [M, N] = act(x + bias), with bias [N] fp32 or null.
  void (*bias_activation_forward)(const Matrix& x, const float* bias, const MutableMatrix& y,
                                  Activation activation, int threads);

  // dx [M, N] = dy * act'(x + bias).
  void (*bias_activation_backward)(const Matrix& dy, const Matrix& x, const float* bias,
                                   const MutableMatrix& dx, Activation activation, int threads);

  // out [N] fp32 = the sum of the rows of x [M, N]; partial is fp32 [ceil(M / kSumRows), N].
  void (*column_sum)(const Matrix& x, float* partial, float* out, int threads);

  // out = softmax(q k^T scale + mask) v, and of each row the maximum and the sum of the
  // exponentials of score - maximum, [batch, heads, queries]. A row that may attend to nothing:
  // all 0. scratch: attention_forward_scratch(shape, threads) floats, aligned to 64 bytes.
  void (*attention_forward)(const AttentionInputs& inputs, const MutableHeads& out,
                            float* row_maximum, float* row_sum, float* scratch, int threads);

  // The gradients whose data is not null. scratch: attention_backward_scratch(shape, threads).
  void (*attention_backward)(const AttentionInputs& inputs, const AttentionResults& results,
                             const AttentionGradients& gradients, float* scratch, int threads);

  // Rotates the first R features of every row of the operands and copies the others.
  void (*rope)(const RopeOperand* operands, int64_t count, const RopeTables& tables,
               const RopeShape& shape, int threads);

  // y [M, H] = n scale with n = x rstd, rstd [M] = 1 / sqrt(mean(x^2) + eps); round_first rounds n
  // to the dtype of x. With a residual, sum = x + residual in the dtype of x takes the place of x.
  void (*rms_norm_forward)(const Matrix& x, const Matrix* residual, const MutableMatrix* sum,
                           const NormVector& weight, double eps, bool round_first,
                           const MutableMatrix& y, float* rstd, int threads);

  // With g = dy scale: dx [M, H] = rstd (g - n mean(g n)) + addend, dweight [H] = sum_m dy n.
  // addend, in the dtype of x, and dx may be null.
  void (*rms_norm_backward)(const Matrix& dy, const Matrix& x, const NormVector& weight,
                            const float* rstd, const Matrix* addend, const MutableMatrix* dx,
                            const ColumnSums& dweight, int threads);

  // y [M, H] = n scale + bias with n = (x - mean) rstd, rstd [M] = 1 / sqrt(var(x) + eps).
  void (*layer_norm_forward)(const Matrix& x, const Matrix* residual, const MutableMatrix* sum,
                             const NormVector& weight, const NormVector& bias, double eps,
                             const MutableMatrix& y, float* mean, float* rstd, int threads);

  // dx [M, H] = rstd (g - mean(g) - n mean(g n)) + addend, dweight as above, dbias [H] = sum_m dy.
  void (*layer_norm_backward)(const Matrix& dy, const Matrix& x, const NormVector& weight,
                              const float* mean, const float* rstd, const Matrix* addend,
                              const MutableMatrix* dx, const ColumnSums& dweight,
                              const ColumnSums& dbias, int threads);

  // out [count]: the sum of squares of each tensor's gradient, the same whatever the threads.
  void (*sums_of_squares)(const AdamWAddresses* tensors, int64_t count, DType dtype, double* out,
                          int threads);

  // One step of AdamW in place. norms [count, 3]: squared norms of the gradient as it came, of the
  // update and of the updated parameter.
  void (*adamw_step)(const AdamWAddresses* tensors, const AdamWFacts* facts, int64_t count,
                     const AdamWCall& call, double* norms, int threads);

  // Scales each tensor whose norm, the last of a row of norms [count, 3], is above its limit down
  // to it, in place. What would be rounded stochastically is rounded to nearest.
  void (*limit_norms)(const AdamWLimit* tensors, const float* norms, int64_t count, DType dtype,
                      Rounding rounding, int threads);
};

constexpr int64_t kDeepSums = 4;   // of deep_product, on any number of threads
constexpr int64_t kSumRows = 256;  // rows of x that one partial sum of column_sum adds
constexpr int64_t kLanes = 16;     // fp32 values in a vector of every build
constexpr int64_t kMaskSpan = 64;  // elements whose keep bits are drawn together
constexpr int64_t kMaxRank = 256;  // of lora_reduce and reft
inline int64_t padded_rank(int64_t rank) { return (rank + kLanes - 1) / kLanes * kLanes; }

namespace amx {  // AVX-512 and the tiles of AMX
const Kernels& table();
}
namespace amxemulated {  // the same, with tiles in plain C++: for tests
const Kernels& table();
}
namespace avx512bf16 {  // AVX-512 with the dot product of bf16 pairs
const Kernels& table();
}
namespace avx512 {
const Kernels& table();
}
namespace avx2 {
const Kernels& table();
}
namespace plain {
const Kernels& table();
}

}  // namespace fasttune::cpu

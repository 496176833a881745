// Every CPU kernel, as a table of functions: each build (AVX-512, AVX2, plain) fills one.
//
// Legend: M rows (tokens), K input features, N output features, R rank, V vocabulary.
// Strides are in elements; the last dimension always has stride 1. `threads` is an upper bound.
#pragma once

#include <cstdint>

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
  const float* addend;    // [M, N] fp32
  int64_t addend_stride;  // of addend
  const float* bias;      // [N] fp32
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
  float* loss;     // [C]
  float* correct;  // [C] or null
  float* entropy;  // [C] or null
};

struct Kernels {
  const char* isa;

  // dst = src, rounded to nearest even.
  void (*convert)(const Matrix& src, const MutableMatrix& dst, int threads);

  // out [M, R] fp32 = scale * (x * keep) panel, with panel [K, padded_rank(R)] fp32, zero padded.
  void (*lora_reduce)(const Matrix& x, const float* panel, int64_t rank, float scale,
                      const Dropout& dropout, float* out, int threads);

  // out[k, r] = sum_m (x * keep)[m, k] t[m, r], with t [M, padded_rank(R)] fp32, zero padded.
  // Written as [K, R], or as [R, K] if transposed. Each output has one fixed summation order.
  void (*lora_outer)(const Matrix& x, const float* t, int64_t rank, const Dropout& dropout,
                     const MutableMatrix& out, bool transposed, int threads);

  // out [M, N] = addend + bias + keep * (t panel), with t [M, R] fp32 and panel [R, N] fp32.
  void (*lora_expand)(const float* t, const float* panel, int64_t rank, const ExpandTerms& terms,
                      const Dropout& dropout, const MutableMatrix& out, int threads);

  // The loss of each row of logits [C, V]; with need_grad the row becomes its gradient.
  void (*cross_entropy_rows)(const MutableMatrix& logits, const int64_t* targets,
                             const RowLossOptions& options, const RowLossOutputs& outputs,
                             int threads);
};

constexpr int64_t kLanes = 16;  // fp32 values in a vector of every build
inline int64_t padded_rank(int64_t rank) { return (rank + kLanes - 1) / kLanes * kLanes; }

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

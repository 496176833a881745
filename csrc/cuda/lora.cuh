// The forward products of a LoRA branch on tensor cores; the maths is in
// fasttune/ops/lora_linear.py. sm_80 and later. x, A, B and y of one 16-bit type; rows of x and A
// start at multiples of 16 bytes, those of B, t and y of lora_up as well. Strides in elements.
#pragma once

#include "common/dtype.h"
#include "cuda/stream.h"

namespace fasttune::cuda {

// What one launch of lora_down takes; GROUP_BRANCHES and GROUP_RANKS of fasttune_kernels' tables.
constexpr int kGroupBranches = 3;
constexpr int kGroupRanks = 64;  // of all branches, each as wide as the widest

struct LoraDownBranch {
  const void* a;              // [R, K], or [K, R]
  const float* scale_tensor;  // 0-d, or null for 1
  const int64_t* seed;        // 0-d, or null: no dropout
  float scale;
  int rank;
  uint32_t threshold;  // of Dropout (common/philox.h)
  uint32_t stream;
};

// t_j [M, R_j] fp32 = scale_j (x * keep_j) A_j^T, one after the other in t. And, transposed, what
// the backward of lora_up needs: d = scale dy B, with dy for x, B for A and N for K.
struct LoraDown {
  const void* x;  // [M, K]
  float* t;
  float* partial;  // [splits, M sum R_j], overwritten; null if there is one split
  int64_t rows, cols, x_stride;
  int64_t cols_per_split;  // a multiple of 64
  int64_t splits;
  uint64_t row_offset;  // of row 0 in the random bits
  int count;            // of branches
  bool transposed;      // the one A lies as [K, R], R a multiple of 8
  LoraDownBranch branches[kGroupBranches];
  DType dtype;
};

// y [M, N] = bias + t B^T.
struct LoraUp {
  const float* t;     // [M, R]
  const void* b;      // [N, R]
  const float* bias;  // [N], or null
  void* y;
  int64_t rows, cols, rank, y_stride;
  DType dtype;
};

struct LoraGradientBranch {
  const float* d;       // [M, R]
  const void* a;        // [R, K]; null for lora_weight_gradient
  const int64_t* seed;  // 0-d, or null: no dropout
  int rank;
  uint32_t threshold, stream;
};

// dx [M, K] = sum_j keep_j * (d_j A_j).
struct LoraInputGradient {
  void* dx;
  int64_t rows, cols, dx_stride;
  uint64_t row_offset;
  int count;
  LoraGradientBranch branches[kGroupBranches];
  DType dtype;
};

// dA_j [R_j, K] fp32 = d_j^T (x * keep_j), one after the other in out. And, transposed, dB [N, R] =
// dy^T t, with dy for x, t for d and N for K.
struct LoraWeightGradient {
  const void* x;  // [M, K]
  float* out;
  float* partial;  // [splits, K sum R_j], overwritten; null if there is one split
  int64_t rows, cols, x_stride;
  int64_t rows_per_split;  // a multiple of 32
  int64_t splits;
  uint64_t row_offset;
  int count;
  bool transposed;
  LoraGradientBranch branches[kGroupBranches];
  DType dtype;
};

void launch_lora_down(const LoraDown& args, Stream stream);
void launch_lora_up(const LoraUp& args, Stream stream);
void launch_lora_input_gradient(const LoraInputGradient& args, Stream stream);
void launch_lora_weight_gradient(const LoraWeightGradient& args, Stream stream);

// Their first pass for one element type, a source each.
template <typename T>
void launch_lora_down_of(const LoraDown& args, Stream stream);
template <typename T>
void launch_lora_weight_gradient_of(const LoraWeightGradient& args, Stream stream);

}  // namespace fasttune::cuda

// AdamW over many tensors; the maths is in fasttune/ops/adamw.py, the tables in common/adamw.h.
#pragma once

#include "common/adamw.h"
#include "cuda/stream.h"

namespace fasttune::cuda {

// Which tensor a thread block works on, which of its blocks that is, and how many it has.
struct AdamWBlock {
  int tensor, number, count;
};

struct SumOfSquares {
  const AdamWAddresses* tensors;  // [n], of which grad and numel are read
  const AdamWBlock* blocks;       // [block_count]
  int64_t block_count;
  float* partial;  // [block_count], overwritten
  int* counter;    // 0 before and after
  double* out;     // the sum over all tensors
  DType grad_type;
};

struct AdamWStep {
  const AdamWAddresses* tensors;  // [n]
  const AdamWFacts* facts;        // [n]
  const AdamWBlock* blocks;       // [block_count]
  int64_t block_count;
  float* partial;             // [block_count, 3], overwritten
  int* counters;              // [n], 0 before and after
  float* norms;               // [n, 3]: of gradient, update and parameter; NaN if skipped
  const double* squares;      // of the gradients whose norm is limited, or null
  const float* grad_scale;    // of a GradScaler, or null
  const float* found_inf;     // not 0: nothing changes; or null
  float max_grad_norm, sign;  // sign -1 climbs
  bool skip_nonfinite;
  uint64_t seed;
  DType param_type, grad_type;
  Moments moments;
  Rounding rounding;
};

struct LimitNorms {
  const AdamWLimit* tensors;  // [n]
  const AdamWBlock* blocks;   // [block_count]
  int64_t block_count;
  const float* norms;  // [n, 3], of which the last column is read
  DType param_type;
  Rounding rounding;  // kStochastic: to nearest
};

void launch_grad_norm(const SumOfSquares& args, Stream stream);
void launch_adamw(const AdamWStep& args, Stream stream);
void launch_limit_norms(const LimitNorms& args, Stream stream);

// launch_adamw for one way of storing the parameters, a source each: adamw_<rounding>.cu.
template <Rounding R>
void launch_adamw_with(const AdamWStep& args, Stream stream);

}  // namespace fasttune::cuda

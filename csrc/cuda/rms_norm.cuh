// RMS norm of rows; the maths is in fasttune/ops/rms_norm.py. Strides in elements.
#pragma once

#include "common/dtype.h"
#include "cuda/stream.h"

namespace fasttune::cuda {

struct RmsNormForward {
  const void* x;         // [M, H]
  const void* residual;  // [M, H], x's type; null: none
  const void* weight;    // [H], x's type or fp32; null: ones
  void* y;               // [M, H], x's type or fp32
  void* sum;             // [M, H], x + residual in x's type; null without a residual
  float* rstd;           // [M]
  int64_t rows, cols;
  int64_t x_stride, residual_stride, y_stride, sum_stride;
  DType x_type, weight_type, y_type;
  float eps, weight_offset;
  bool round_first;  // x rstd is rounded to x's type before the weight multiplies
};

struct RmsNormBackward {
  const void* dy;      // [M, H], x's type or fp32
  const void* x;       // [M, H]
  const void* weight;  // [H], x's type or fp32; null: ones
  const float* rstd;   // [M]
  const void* addend;  // [M, H], x's type, added to dx; null: none
  void* dx;            // [M, H], x's type; null: not wanted
  float* partial;      // [blocks, H], overwritten; null where dweight is
  float* dweight;      // [H]; null: not wanted
  int64_t rows, cols;
  int64_t dy_stride, x_stride, addend_stride, dx_stride;
  int64_t blocks;  // that share the rows; the order of the sums of dweight depends on it
  DType dy_type, x_type, weight_type;
  float weight_offset;
};

void launch_rms_norm_fwd(const RmsNormForward& args, Stream stream);
void launch_rms_norm_bwd(const RmsNormBackward& args, Stream stream);

}  // namespace fasttune::cuda

// The elementwise parts of a bottleneck adapter; the maths is in fasttune/ops/bias_activation.py
// and fasttune/ops/bottleneck.py.
#pragma once

#include "common/activation.h"
#include "common/dtype.h"
#include "cuda/stream.h"

namespace fasttune::cuda {

// [M, N], unit column stride; the other stride in elements. A vector [N] has stride 0; without
// data there is none.
struct Matrix {
  void* data;
  int64_t stride;
  DType dtype;
};

// out = act(x + bias), or where there is a dy, dy act'(x + bias).
struct BiasActivation {
  Matrix dy, x, bias, out;
  int64_t rows, cols;
  Activation activation;
};

// out = addend + keep x scale column_scale; branch 0 of dropout's streams.
struct ScaledSum {
  Matrix x, addend, column_scale, out;
  int64_t rows, cols;
  const int64_t* seed;  // null: nothing is dropped
  uint32_t threshold;
  float scale;
};

void launch_bias_activation(const BiasActivation& args, Stream stream);
void launch_scaled_sum(const ScaledSum& args, Stream stream);

}  // namespace fasttune::cuda

// y = act(gate) * up and its gradients; the maths is in fasttune/ops/glu.py. Strides in elements.
#pragma once

#include "common/activation.h"
#include "common/dtype.h"
#include "cuda/stream.h"

namespace fasttune::cuda {

// All tensors [M, I], of one type.
struct GluForward {
  const void *gate, *up;
  void* y;
  int64_t rows, cols;
  int64_t gate_stride, up_stride, y_stride;
  DType dtype;
  Activation activation;
};

struct GluBackward {
  const void *dy, *gate, *up;
  void *dgate, *dup;  // null: not wanted
  int64_t rows, cols;
  int64_t dy_stride, gate_stride, up_stride, dgate_stride, dup_stride;
  DType dtype;
  Activation activation;
};

void launch_glu_fwd(const GluForward& args, Stream stream);
void launch_glu_bwd(const GluBackward& args, Stream stream);

}  // namespace fasttune::cuda

// The launchers of glu for ctypes; gate and up may be the halves of one tensor.
#include "cuda/glu.cuh"

using fasttune::Activation;
using fasttune::DType;

extern "C" void glu_fwd(const void* gate, const void* up, void* y, int64_t rows, int64_t cols,
                        int64_t stride, int64_t dtype, int64_t activation) {
  fasttune::cuda::launch_glu_fwd(
      {gate, up, y, rows, cols, stride, stride, cols, DType(dtype), Activation(activation)},
      nullptr);
}

extern "C" void glu_bwd(const void* dy, const void* gate, const void* up, void* dgate, void* dup,
                        int64_t rows, int64_t cols, int64_t stride, int64_t dtype,
                        int64_t activation) {
  fasttune::cuda::launch_glu_bwd({dy, gate, up, dgate, dup, rows, cols, cols, stride, stride, cols,
                                  cols, DType(dtype), Activation(activation)},
                                 nullptr);
}

// The launchers of rms_norm for ctypes.
#include "cuda/rms_norm.cuh"

using fasttune::DType;

extern "C" void rms_norm_fwd(const void* x, const void* residual, const void* weight, void* y,
                             void* sum, float* rstd, int64_t rows, int64_t cols, int64_t x_stride,
                             int64_t x_type, int64_t weight_type, int64_t y_type, float eps,
                             float weight_offset, int64_t round_first) {
  fasttune::cuda::launch_rms_norm_fwd(
      {x, residual, weight, y, sum, rstd, rows, cols, x_stride, cols, cols, cols, DType(x_type),
       DType(weight_type), DType(y_type), eps, weight_offset, round_first != 0},
      nullptr);
}

extern "C" void rms_norm_bwd(const void* dy, const void* x, const void* weight, const float* rstd,
                             const void* addend, void* dx, float* partial, float* dweight,
                             int64_t rows, int64_t cols, int64_t x_stride, int64_t blocks,
                             int64_t dy_type, int64_t x_type, int64_t weight_type,
                             float weight_offset) {
  fasttune::cuda::launch_rms_norm_bwd(
      {dy, x, weight, rstd, addend, dx, partial, dweight, rows, cols, cols, x_stride, cols, cols,
       blocks, DType(dy_type), DType(x_type), DType(weight_type), weight_offset},
      nullptr);
}

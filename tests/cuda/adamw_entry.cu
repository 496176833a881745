// The launchers of AdamW for ctypes.
#include "cuda/adamw.cuh"

using namespace fasttune;

extern "C" void grad_norm(const void* tensors, const void* blocks, int64_t block_count,
                          float* partial, int* counter, double* out, int64_t grad_type) {
  cuda::launch_grad_norm(
      {static_cast<const AdamWAddresses*>(tensors), static_cast<const cuda::AdamWBlock*>(blocks),
       block_count, partial, counter, out, DType(grad_type)},
      nullptr);
}

extern "C" void adamw(const void* tensors, const void* facts, const void* blocks,
                      int64_t block_count, float* partial, int* counters, float* norms,
                      const double* squares, const float* grad_scale, const float* found_inf,
                      float max_grad_norm, float sign, int64_t skip_nonfinite, int64_t seed,
                      int64_t param_type, int64_t grad_type, int64_t moments, int64_t rounding) {
  cuda::launch_adamw(
      {static_cast<const AdamWAddresses*>(tensors), static_cast<const AdamWFacts*>(facts),
       static_cast<const cuda::AdamWBlock*>(blocks), block_count, partial, counters, norms, squares,
       grad_scale, found_inf, max_grad_norm, sign, skip_nonfinite != 0, static_cast<uint64_t>(seed),
       DType(param_type), DType(grad_type), Moments(moments), Rounding(rounding)},
      nullptr);
}

extern "C" void limit_norms(const void* tensors, const void* blocks, int64_t block_count,
                            const float* norms, int64_t param_type, int64_t rounding) {
  cuda::launch_limit_norms(
      {static_cast<const AdamWLimit*>(tensors), static_cast<const cuda::AdamWBlock*>(blocks),
       block_count, norms, DType(param_type), Rounding(rounding)},
      nullptr);
}

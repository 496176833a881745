#include "cuda/adamw_runs.cuh"

// Floor: what is above its limit is read and written, 8 bytes an fp32 element; the rest is not.
namespace fasttune::cuda {
namespace {

template <typename P, Rounding R>
__global__ void __launch_bounds__(kAdamWThreads) limit_norms_kernel(LimitNorms args) {
  const AdamWBlock block = args.blocks[blockIdx.x];
  const AdamWLimit& at = args.tensors[block.tensor];
  const float factor = limit_factor(at, args.norms + 3 * block.tensor);
  if (factor == 1.0f) return;
  const Parameter<P, R> param{static_cast<P*>(at.param), at.residue};
  const bool aligned = is_aligned(at.param) && is_aligned(at.residue);
  const int64_t begin = block.number * kAdamWBlock;
  for (int64_t stretch = begin; stretch < begin + kAdamWBlock; stretch += kAdamWStride) {
    const int64_t first = stretch + threadIdx.x * kRun;
    const bool whole = aligned && first + kRun <= at.numel;
    float p[kRun];
    param.load(first, at.numel, whole, p);
    for (int i = 0; i < kRun; ++i) p[i] *= factor;
    param.store(RandomBits{}, first, at.numel, whole, p);
  }
}

template <typename P, Rounding R>
void launch_with(const LimitNorms& args, Stream stream) {
  launch(limit_norms_kernel<P, R>, dim3(static_cast<unsigned>(args.block_count)),
         dim3(kAdamWThreads), 0, stream, args);
}

}  // namespace

void launch_limit_norms(const LimitNorms& args, Stream stream) {
  if (args.block_count == 0) return;
  if (args.rounding == Rounding::kMaster)
    return launch_with<__nv_bfloat16, Rounding::kMaster>(args, stream);
  with_element(args.param_type, [&](auto p) {
    using P = decltype(p);
    if (args.rounding == Rounding::kKahan)
      launch_with<P, Rounding::kKahan>(args, stream);
    else
      launch_with<P, Rounding::kNearest>(args, stream);
  });
}

}  // namespace fasttune::cuda

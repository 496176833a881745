#include "cuda/adamw_runs.cuh"

// Floor: a norm reads 4 bytes an fp32 element, so memory binds it.
namespace fasttune::cuda {
namespace {

template <typename G>
__global__ void __launch_bounds__(kAdamWThreads) grad_norm_kernel(SumOfSquares args) {
  const AdamWBlock block = args.blocks[blockIdx.x];
  const AdamWAddresses& at = args.tensors[block.tensor];
  const G* grad = static_cast<const G*>(at.grad);
  const int64_t begin = block.number * kAdamWBlock;
  const bool aligned = is_aligned(grad);
  float sum = 0.0f;
  for (int64_t at_first = begin; at_first < begin + kAdamWBlock; at_first += kAdamWStride) {
    const int64_t first = at_first + threadIdx.x * kRun;
    G run[kRun];
    load_run(grad, first, at.numel, aligned && first + kRun <= at.numel, rounded_to<G>(0.0f), run);
    for (int i = 0; i < kRun; ++i) sum += to_float(run[i]) * to_float(run[i]);
  }
  sum = block_sum<kAdamWThreads>(sum);
  if (threadIdx.x == 0) args.partial[blockIdx.x] = sum;
  if (!is_last_block(args.counter, static_cast<int>(args.block_count))) return;
  const double total = ordered_sum(args.partial, args.block_count, 1);
  if (threadIdx.x == 0) *args.out = total;
}

}  // namespace

void launch_grad_norm(const SumOfSquares& args, Stream stream) {
  if (args.block_count == 0) return;
  with_element(args.grad_type, [&](auto g) {
    launch(grad_norm_kernel<decltype(g)>, dim3(static_cast<unsigned>(args.block_count)),
           dim3(kAdamWThreads), 0, stream, args);
  });
}

void launch_adamw(const AdamWStep& args, Stream stream) {
  if (args.block_count == 0) return;
  switch (args.rounding) {
    case Rounding::kNearest:
      return launch_adamw_with<Rounding::kNearest>(args, stream);
    case Rounding::kMaster:
      return launch_adamw_with<Rounding::kMaster>(args, stream);
    case Rounding::kStochastic:
      return launch_adamw_with<Rounding::kStochastic>(args, stream);
    case Rounding::kKahan:
      return launch_adamw_with<Rounding::kKahan>(args, stream);
  }
}

}  // namespace fasttune::cuda

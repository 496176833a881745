#include "cuda/elements.cuh"
#include "cuda/lora.cuh"

namespace fasttune::cuda {
namespace {

constexpr int kThreads = 256;

// Floor: the partial sums are read once. The order of the sum is that of the splits.
__global__ void __launch_bounds__(kThreads)
    lora_sum_kernel(const float* partial, float* out, int64_t splits, int64_t count) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  const int here = static_cast<int>(count - first < 4 ? count - first : 4);
  if (here <= 0) return;
  if (here == 4 && count % 4 == 0) {
    Pack<float, 4> sum = load_pack<4>(partial + first);
    for (int64_t split = 1; split < splits; ++split) {
      const Pack<float, 4> more = load_pack<4>(partial + split * count + first);
      for (int i = 0; i < 4; ++i) sum.values[i] += more.values[i];
    }
    store_pack(out + first, sum);
  } else {
    for (int i = 0; i < here; ++i) {
      float sum = 0.0f;
      for (int64_t split = 0; split < splits; ++split) sum += partial[split * count + first + i];
      out[first + i] = sum;
    }
  }
}

// The sum of all splits, if there are any, in out [count].
void launch_sum(const float* partial, float* out, int64_t splits, int64_t count, Stream stream) {
  if (partial == nullptr) return;
  const int64_t blocks = (count + 4 * kThreads - 1) / (4 * kThreads);
  launch(lora_sum_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, partial,
         out, splits, count);
}

template <typename Branch>
int64_t sum_of_ranks(const Branch* branches, int count) {
  int64_t ranks = 0;
  for (int j = 0; j < count; ++j) ranks += branches[j].rank;
  return ranks;
}

}  // namespace

void launch_lora_down(const LoraDown& args, Stream stream) {
  const int64_t count = args.rows * sum_of_ranks(args.branches, args.count);
  if (count == 0) return;
  if (args.dtype == DType::kFloat16)
    launch_lora_down_of<__half>(args, stream);
  else
    launch_lora_down_of<__nv_bfloat16>(args, stream);
  launch_sum(args.partial, args.t, args.splits, count, stream);
}

void launch_lora_weight_gradient(const LoraWeightGradient& args, Stream stream) {
  const int64_t count = args.cols * sum_of_ranks(args.branches, args.count);
  if (count == 0) return;
  if (args.dtype == DType::kFloat16)
    launch_lora_weight_gradient_of<__half>(args, stream);
  else
    launch_lora_weight_gradient_of<__nv_bfloat16>(args, stream);
  launch_sum(args.partial, args.out, args.splits, count, stream);
}

}  // namespace fasttune::cuda

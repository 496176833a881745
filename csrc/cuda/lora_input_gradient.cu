#include "cuda/lora.cuh"
#include "cuda/lora_fragments.cuh"
#include "cuda/lora_terms.cuh"

// Floor: dx is written once, 2 M K bytes; d and A are small. The sum over the branches stays in
// registers, fp32, and rounds once. Products as in lora_up.
namespace fasttune::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;  // of dx, 16 a warp
constexpr int kColumns = 64;
constexpr int kStep = 32;  // ranks at a time

template <typename T>
__global__ void __launch_bounds__(kThreads) lora_input_gradient_kernel(LoraInputGradient args) {
  using Left = SharedTile<float, kStep>;
  using Right = SharedTile<T, kColumns>;  // A as it lies: [R, K]
  constexpr int kLeft = kRows * kStep, kRight = kStep * kColumns;
  static_assert(2 * kRight >= kRows * kColumns);
  __shared__ __align__(16) float ds[2 * kLeft];
  __shared__ __align__(16) T as[2 * kRight];  // dx at the end
  const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
  const int warp_row = threadIdx.x / 32 * 16;
  const int64_t column_blocks = (args.cols + kColumns - 1) / kColumns;
  const int64_t col = blockIdx.x % column_blocks * kColumns;
  const int64_t row = blockIdx.x / column_blocks * kRows;
  float sums[kColumns / 8][4] = {};

  for (int j = 0; j < args.count; ++j) {
    const LoraGradientBranch branch = args.branches[j];
    float part[kColumns / 8][4] = {};
    const auto fill = [&](int64_t step, int stage) {
      const int64_t rank = step * kStep;
      Left::template fill<kRows, kThreads>(ds + stage * kLeft, branch.d, branch.rank, row,
                                           args.rows, rank, branch.rank);
      Right::template fill<kStep, kThreads>(as + stage * kRight, static_cast<const T*>(branch.a),
                                            args.cols, rank, branch.rank, col, args.cols);
    };
    const auto use = [&](int64_t step, int stage) {
#pragma unroll 1
      for (int k = 0; k < kStep; k += 16) {
        if (step * kStep + k >= branch.rank) break;
        uint32_t d[3][4];
        load_lhs_terms<kStep>(d, ds + stage * kLeft, warp_row, k);
#pragma unroll
        for (int n = 0; n < kColumns / 8; n += 2) {
          uint32_t a[4];
          Right::load_rhs_transposed(a, as + stage * kRight, k, n);
          multiply_terms(part[n], d, {a[0], a[1]}, T{});
          multiply_terms(part[n + 1], d, {a[2], a[3]}, T{});
        }
      }
    };
    double_buffered((branch.rank + kStep - 1) / kStep, fill, use);
    const uint64_t seed = branch.seed ? static_cast<uint64_t>(*branch.seed) : 0;
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      uint32_t two[4] = {3, 3, 3, 3};
      if (branch.seed)
        keep_pairs(two, seed, branch.threshold, branch.stream, args.row_offset + row + warp_row,
                   static_cast<uint32_t>(col / 8 + n));
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (two[i / 2] >> (i % 2) & 1) sums[n + i / 4][i % 4] += part[n + i / 4][i % 4];
    }
  }

#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n)
    for (int i = 0; i < 2; ++i)
      store_pack(as + Right::offset(warp_row + group + i * 8, n) + pair * 2,
                 Pack<T, 2>{{rounded_to<T>(sums[n][2 * i]), rounded_to<T>(sums[n][2 * i + 1])}});
  __syncthreads();
  Right::template drain<kRows, kThreads>(as, static_cast<T*>(args.dx), args.dx_stride, row,
                                         args.rows, col, args.cols);
}

}  // namespace

void launch_lora_input_gradient(const LoraInputGradient& args, Stream stream) {
  if (args.rows * args.cols == 0) return;
  const int64_t blocks = (args.rows + kRows - 1) / kRows * ((args.cols + kColumns - 1) / kColumns);
  const dim3 grid(static_cast<unsigned>(blocks));
  if (args.dtype == DType::kFloat16)
    launch(lora_input_gradient_kernel<__half>, grid, dim3(kThreads), 0, stream, args);
  else
    launch(lora_input_gradient_kernel<__nv_bfloat16>, grid, dim3(kThreads), 0, stream, args);
}

}  // namespace fasttune::cuda

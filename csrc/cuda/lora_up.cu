#include "cuda/lora.cuh"
#include "cuda/lora_terms.cuh"
#include "cuda/lora_tiles.cuh"

// Floor: y is written once, 2 M N bytes, against 6 M N R operations for bf16 and 12 for fp16; t and
// B are small. t is fp32 and stays exact: three bf16 terms of eight bits each, whose products with
// a bf16 are exact as well; an fp16 is two such terms.
namespace fasttune::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;  // of y, 16 a warp
constexpr int kColumns = 128;
constexpr int kStep = 32;  // ranks at a time

template <typename T>
__global__ void __launch_bounds__(kThreads) lora_up_kernel(LoraUp args) {
  using Left = SharedTile<float, kStep>;
  using Right = SharedTile<T, kStep>;
  using Staged = SharedTile<T, kColumns>;
  constexpr int kLeft = kRows * kStep, kRight = kColumns * kStep;
  static_assert(2 * kRight >= kRows * kColumns);
  __shared__ __align__(16) float ts[2 * kLeft];
  __shared__ __align__(16) T bs[2 * kRight];  // y at the end
  const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
  const int warp_row = threadIdx.x / 32 * 16;
  const int64_t column_blocks = (args.cols + kColumns - 1) / kColumns;
  const int64_t col = blockIdx.x % column_blocks * kColumns;
  const int64_t row = blockIdx.x / column_blocks * kRows;
  float sums[kColumns / 8][4] = {};

  const auto fill = [&](int64_t step, int stage) {
    const int64_t rank = step * kStep;
    Left::template fill<kRows, kThreads>(ts + stage * kLeft, args.t, args.rank, row, args.rows,
                                         rank, args.rank);
    Right::template fill<kColumns, kThreads>(bs + stage * kRight, static_cast<const T*>(args.b),
                                             args.rank, col, args.cols, rank, args.rank);
  };
  const auto use = [&](int64_t step, int stage) {
#pragma unroll 1
    for (int k = 0; k < kStep; k += 16) {
      if (step * kStep + k >= args.rank) break;
      uint32_t t[3][4];
      load_lhs_terms<kStep>(t, ts + stage * kLeft, warp_row, k);
#pragma unroll
      for (int n = 0; n < kColumns / 8; n += 2) {
        uint32_t b[4];
        Right::load_rhs(b, bs + stage * kRight, n * 8, k / 8);
        multiply_terms(sums[n], t, {b[0], b[1]}, T{});
        multiply_terms(sums[n + 1], t, {b[2], b[3]}, T{});
      }
    }
  };
  double_buffered((args.rank + kStep - 1) / kStep, fill, use);

#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    float bias[2] = {0.0f, 0.0f};
    for (int i = 0; i < 2; ++i)
      if (args.bias && col + n * 8 + pair * 2 + i < args.cols)
        bias[i] = args.bias[col + n * 8 + pair * 2 + i];
    for (int i = 0; i < 2; ++i) {
      const int r = warp_row + group + i * 8;
      store_pack(bs + Staged::offset(r, n) + pair * 2,
                 Pack<T, 2>{{rounded_to<T>(sums[n][2 * i] + bias[0]),
                             rounded_to<T>(sums[n][2 * i + 1] + bias[1])}});
    }
  }
  __syncthreads();
  Staged::template drain<kRows, kThreads>(bs, static_cast<T*>(args.y), args.y_stride, row,
                                          args.rows, col, args.cols);
}

}  // namespace

void launch_lora_up(const LoraUp& args, Stream stream) {
  if (args.rows * args.cols == 0) return;
  const int64_t blocks = (args.rows + kRows - 1) / kRows * ((args.cols + kColumns - 1) / kColumns);
  const dim3 grid(static_cast<unsigned>(blocks));
  if (args.dtype == DType::kFloat16)
    launch(lora_up_kernel<__half>, grid, dim3(kThreads), 0, stream, args);
  else
    launch(lora_up_kernel<__nv_bfloat16>, grid, dim3(kThreads), 0, stream, args);
}

}  // namespace fasttune::cuda

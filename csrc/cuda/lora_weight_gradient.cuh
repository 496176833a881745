// lora_weight_gradient: the kernel and its launch for one element type.
//
// Floor: x is read once for all branches, 2 M C bytes. A block has a stripe of columns, a warp 16
// of them, and all ranks; splits of the rows fill the device, and their sums are added in order by
// a second kernel. Elements are dropped in the registers, anew for each branch.
#pragma once

#include "cuda/lora.cuh"
#include "cuda/lora_fragments.cuh"
#include "cuda/lora_terms.cuh"

namespace fasttune::cuda {

constexpr int kGradientThreads = 128;
constexpr int kGradientColumns = 64;  // of x, 16 a warp
constexpr int kGradientRows = 32;     // a step
// A multiprocessor's blocks, 0 for the compiler's choice, with which fp16's twice as many terms
// spill.
template <typename T>
constexpr int kGradientBlocks = 0;
template <>
constexpr int kGradientBlocks<__half> = 3;

// Clears what is dropped of the fragment of x [row, row + 16) x [8 octet, 8 octet + 16): a register
// holds two rows of one column. A lane draws the bits of one row and octet.
__device__ __forceinline__ void drop_rows(uint32_t (&x)[4], uint64_t seed, uint32_t threshold,
                                          uint32_t stream, uint64_t row, uint32_t octet) {
  const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
  const uint32_t kept = keep_bits(seed, threshold, stream, row + lane % 16, octet + lane / 16);
  for (int i = 0; i < 4; ++i) {
    const int first = i * 8 + pair * 2;
    const uint32_t upper = __shfl_sync(0xFFFFFFFFu, kept, first) >> group & 1;
    const uint32_t lower = __shfl_sync(0xFFFFFFFFu, kept, first + 1) >> group & 1;
    x[i] &= register_mask(upper | lower << 1);
  }
}

template <typename T, int Branches, int Ranks>
__global__ void __launch_bounds__(kGradientThreads, kGradientBlocks<T>)
    lora_weight_gradient_kernel(LoraWeightGradient args) {
  using Left = SharedTile<float, Ranks>;
  using Right = SharedTile<T, kGradientColumns>;
  constexpr int kLeft = kGradientRows * Ranks, kRight = kGradientRows * kGradientColumns;
  __shared__ __align__(16) float ds[2 * Branches * kLeft];
  __shared__ __align__(16) T xs[2 * kRight];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kGradientColumns;
  const int64_t begin = blockIdx.y * args.rows_per_split, rest = args.rows - begin;
  const int64_t end = begin + (rest < args.rows_per_split ? rest : args.rows_per_split);
  uint64_t seeds[Branches];
  for (int j = 0; j < Branches; ++j)
    seeds[j] = args.branches[j].seed ? static_cast<uint64_t>(*args.branches[j].seed) : 0;
  float sums[Branches][Ranks / 16][2][4] = {};

  const auto fill = [&](int64_t step, int stage) {
    const int64_t row = begin + step * kGradientRows;
    Right::template fill<kGradientRows, kGradientThreads>(xs + stage * kRight,
                                                          static_cast<const T*>(args.x),
                                                          args.x_stride, row, end, col, args.cols);
    for (int j = 0; j < Branches; ++j)
      Left::template fill<kGradientRows, kGradientThreads>(
          ds + (stage * Branches + j) * kLeft, args.branches[j].d, args.branches[j].rank, row, end,
          0, args.branches[j].rank);
  };
  const auto use = [&](int64_t step, int stage) {
#pragma unroll 1
    for (int k = 0; k < kGradientRows; k += 16) {
      uint32_t whole[4];
      Right::load_rhs_transposed(whole, xs + stage * kRight, k, warp * 2);
#pragma unroll
      for (int j = 0; j < Branches; ++j) {
        uint32_t kept[4] = {whole[0], whole[1], whole[2], whole[3]};
        if (args.branches[j].seed)
          drop_rows(kept, seeds[j], args.branches[j].threshold, args.branches[j].stream,
                    args.row_offset + begin + step * kGradientRows + k,
                    static_cast<uint32_t>(col / 8 + warp * 2));
#pragma unroll
        for (int m = 0; m < Ranks / 16; ++m) {
          uint32_t d[3][4];
          load_lhs_terms_transposed<Ranks>(d, ds + (stage * Branches + j) * kLeft, m * 16, k);
          add_terms(sums[j][m][0], d, {kept[0], kept[1]}, T{});
          add_terms(sums[j][m][1], d, {kept[2], kept[3]}, T{});
        }
      }
    }
  };
  double_buffered((end - begin + kGradientRows - 1) / kGradientRows, fill, use);

  int64_t ranks = 0, offset = 0;
  for (int j = 0; j < Branches; ++j) ranks += args.branches[j].rank;
  float* all = args.partial ? args.partial + blockIdx.y * args.cols * ranks : args.out;
#pragma unroll
  for (int j = 0; j < Branches; ++j) {
    const int64_t rank = args.branches[j].rank;
    float* out = all + offset;
    const bool whole = args.cols % 4 == 0 && is_aligned(out);
#pragma unroll
    for (int m = 0; m < Ranks / 16; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const Pack<float, 4> four = joined(sums[j][m][n]);
        const int own = m * 16 + lane / 4 + lane % 2 * 8;
        const int64_t first = col + warp * 16 + n * 8 + lane % 4 / 2 * 4;
        if (own >= rank) continue;
        if (!args.transposed) {
          store_four(out + own * args.cols, first, args.cols, whole, four);
        } else {
          for (int i = 0; i < 4; ++i)
            if (first + i < args.cols) out[(first + i) * rank + own] = four.values[i];
        }
      }
    offset += args.cols * rank;
  }
}

template <typename T>
void launch_lora_weight_gradient_of(const LoraWeightGradient& args, Stream stream) {
  const dim3 grid(static_cast<unsigned>((args.cols + kGradientColumns - 1) / kGradientColumns),
                  static_cast<unsigned>(args.splits));
  int widest = 0;
  for (int j = 0; j < args.count; ++j)
    widest = args.branches[j].rank > widest ? args.branches[j].rank : widest;
  const auto go = [&](auto kernel) {
    launch(kernel, grid, dim3(kGradientThreads), 0, stream, args);
  };
  if (args.count == 1) {
    if (widest <= 16) return go(lora_weight_gradient_kernel<T, 1, 16>);
    if (widest <= 32) return go(lora_weight_gradient_kernel<T, 1, 32>);
    if (widest <= 64) return go(lora_weight_gradient_kernel<T, 1, 64>);
  } else if (args.count == 2) {
    if (widest <= 16) return go(lora_weight_gradient_kernel<T, 2, 16>);
    if (widest <= 32) return go(lora_weight_gradient_kernel<T, 2, 32>);
  } else if (args.count == 3) {
    if (widest <= 16) return go(lora_weight_gradient_kernel<T, 3, 16>);
  }
  throw std::invalid_argument(
      "lora_weight_gradient: more branches or ranks than kGroupBranches, kGroupRanks");
}

}  // namespace fasttune::cuda

// lora_down: the kernel and its launch for one element type.
//
// Floor: x is read once for all branches, 2 M K bytes, against 2 M K R operations a branch: memory
// binds up to rank 64 or so. A warp has 16 rows of x in its registers and drops elements there,
// anew for each branch. Splits of K fill the device when there are few rows; their sums are added
// in order by a second kernel.
#pragma once

#include "cuda/lora.cuh"
#include "cuda/lora_fragments.cuh"
#include "cuda/lora_tiles.cuh"

namespace fasttune::cuda {

constexpr int kDownThreads = 128;
constexpr int kDownRows = 64;     // of x, 16 a warp
constexpr int kDownColumns = 64;  // a step

template <typename T, int Branches, int Ranks, bool Transposed>
__global__ void __launch_bounds__(kDownThreads) lora_down_kernel(LoraDown args) {
  using Tile = SharedTile<T, kDownColumns>;
  using Turned = SharedTile<T, Ranks>;  // of a transposed factor
  constexpr int kTile = kDownRows * kDownColumns, kFactor = Ranks * kDownColumns;
  __shared__ __align__(16) T xs[2 * kTile];
  __shared__ __align__(16) T as[2 * Branches * kFactor];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDownRows;
  const int64_t begin = blockIdx.y * args.cols_per_split;
  const int64_t rest = args.cols - begin;
  const int64_t end = begin + (rest < args.cols_per_split ? rest : args.cols_per_split);
  const T* x = static_cast<const T*>(args.x);
  uint64_t seeds[Branches];
  for (int j = 0; j < Branches; ++j)
    seeds[j] = args.branches[j].seed ? static_cast<uint64_t>(*args.branches[j].seed) : 0;
  float sums[Branches][Ranks / 8][4] = {};

  const auto fill = [&](int64_t step, int stage) {
    const int64_t col = begin + step * kDownColumns;
    Tile::template fill<kDownRows, kDownThreads>(xs + stage * kTile, x, args.x_stride, row,
                                                 args.rows, col, end);
    for (int j = 0; j < Branches; ++j) {
      const T* a = static_cast<const T*>(args.branches[j].a);
      const int rank = args.branches[j].rank;
      T* to = as + (stage * Branches + j) * kFactor;
      if constexpr (Transposed)
        Turned::template fill<kDownColumns, kDownThreads>(to, a, rank, col, end, 0, rank);
      else
        Tile::template fill<Ranks, kDownThreads>(to, a, args.cols, 0, rank, col, end);
    }
  };
  const auto use = [&](int64_t step, int stage) {
    const int64_t col = begin + step * kDownColumns;
#pragma unroll 1  // other warps hide the latency; unrolled, nvcc takes several times as long
    for (int k = 0; k < kDownColumns; k += 16) {
      uint32_t whole[4];
      Tile::load_lhs(whole, xs + stage * kTile, warp * 16, k / 8);
#pragma unroll
      for (int j = 0; j < Branches; ++j) {
        uint32_t kept[4] = {whole[0], whole[1], whole[2], whole[3]};
        if (args.branches[j].seed) {
          uint32_t two[4];
          keep_pairs(two, seeds[j], args.branches[j].threshold, args.branches[j].stream,
                     args.row_offset + row + warp * 16, static_cast<uint32_t>((col + k) / 8));
          for (int i = 0; i < 4; ++i) kept[i] &= register_mask(two[i]);
        }
#pragma unroll
        for (int i = 0; i < Ranks / 8; i += 2) {
          uint32_t a[4];
          const T* factor = as + (stage * Branches + j) * kFactor;
          if constexpr (Transposed)
            Turned::load_rhs_transposed(a, factor, k, i);
          else
            Tile::load_rhs(a, factor, i * 8, k / 8);
          add_product_16x8x16(sums[j][i], kept, {a[0], a[1]}, T{});
          add_product_16x8x16(sums[j][i + 1], kept, {a[2], a[3]}, T{});
        }
      }
    }
  };
  double_buffered((end - begin + kDownColumns - 1) / kDownColumns, fill, use);

  int64_t ranks = 0, offset = 0;
  for (int j = 0; j < Branches; ++j) ranks += args.branches[j].rank;
  float* all = args.partial ? args.partial + blockIdx.y * args.rows * ranks : args.t;
  const int64_t own = row + warp * 16 + lane / 4 + lane % 2 * 8;
#pragma unroll
  for (int j = 0; j < Branches; ++j) {
    const LoraDownBranch& branch = args.branches[j];
    const float scale = branch.scale * (branch.scale_tensor ? *branch.scale_tensor : 1.0f);
    const bool whole = branch.rank % 4 == 0 && is_aligned(all + offset);
    float* out = all + offset + own * branch.rank;
#pragma unroll
    for (int i = 0; i < Ranks / 8; ++i) {
      Pack<float, 4> four = joined(sums[j][i]);
      for (float& value : four.values) value *= scale;
      const int first = i * 8 + lane % 4 / 2 * 4;
      if (own < args.rows) store_four(out, first, branch.rank, whole, four);
    }
    offset += args.rows * branch.rank;
  }
}

template <typename T>
void launch_lora_down_of(const LoraDown& args, Stream stream) {
  const dim3 grid(static_cast<unsigned>((args.rows + kDownRows - 1) / kDownRows),
                  static_cast<unsigned>(args.splits));
  int widest = 0;
  for (int j = 0; j < args.count; ++j)
    widest = args.branches[j].rank > widest ? args.branches[j].rank : widest;
  const auto go = [&](auto kernel) { launch(kernel, grid, dim3(kDownThreads), 0, stream, args); };
  if (args.transposed) {
    if (args.count == 1 && widest <= 16) return go(lora_down_kernel<T, 1, 16, true>);
    if (args.count == 1 && widest <= 32) return go(lora_down_kernel<T, 1, 32, true>);
    if (args.count == 1 && widest <= 64) return go(lora_down_kernel<T, 1, 64, true>);
  } else if (args.count == 1) {
    if (widest <= 16) return go(lora_down_kernel<T, 1, 16, false>);
    if (widest <= 32) return go(lora_down_kernel<T, 1, 32, false>);
    if (widest <= 64) return go(lora_down_kernel<T, 1, 64, false>);
  } else if (args.count == 2) {
    if (widest <= 16) return go(lora_down_kernel<T, 2, 16, false>);
    if (widest <= 32) return go(lora_down_kernel<T, 2, 32, false>);
  } else if (args.count == 3) {
    if (widest <= 16) return go(lora_down_kernel<T, 3, 16, false>);
  }
  throw std::invalid_argument("lora_down: more branches or ranks than kGroupBranches, kGroupRanks");
}

}  // namespace fasttune::cuda

// Tiles in shared memory for the tensor cores, filled past the registers.
#pragma once

#include "cuda/elements.cuh"

namespace fasttune::cuda {

// Rows of Columns elements, in chunks of 16 bytes. A chunk is stored at its number xor the row's,
// so that the eight rows that ldmatrix reads at a time lie in different banks.
template <typename T, int Columns>
struct SharedTile {
  static constexpr int kChunk = kVectorBytes / sizeof(T);
  static constexpr int kChunks = Columns / kChunk;
  static constexpr int kTurns = kChunks < 8 ? kChunks : 8;
  static_assert(kChunks % kTurns == 0 && 8 % kTurns == 0);

  // Of the first element of a chunk.
  static __device__ __forceinline__ int offset(int row, int chunk) {
    return row * Columns + (chunk ^ row / (8 / kTurns) % kTurns) * kChunk;
  }

  // Starts to copy columns [col, col + Columns) of the rows from `row` on; zeros beyond row_end and
  // col_end, which is a multiple of kChunk.
  template <int Rows, int Threads>
  static __device__ __forceinline__ void fill(T* tile, const T* matrix, int64_t stride, int64_t row,
                                              int64_t row_end, int64_t col, int64_t col_end) {
    static_assert(Rows * kChunks % Threads == 0 || Rows * kChunks < Threads);
    for (int i = threadIdx.x; i < Rows * kChunks; i += Threads) {
      const int r = i / kChunks, chunk = i % kChunks;
      const int64_t c = col + chunk * kChunk;
      T* to = tile + offset(r, chunk);
      if (row + r < row_end && c < col_end)
        copy_async_16(to, matrix + (row + r) * stride + c);
      else
        store_pack(to, Pack<T, kChunk>{});
    }
  }

  // The way back, for what fill would copy.
  template <int Rows, int Threads>
  static __device__ __forceinline__ void drain(const T* tile, T* matrix, int64_t stride,
                                               int64_t row, int64_t row_end, int64_t col,
                                               int64_t col_end) {
    for (int i = threadIdx.x; i < Rows * kChunks; i += Threads) {
      const int r = i / kChunks, chunk = i % kChunks;
      const int64_t c = col + chunk * kChunk;
      if (row + r < row_end && c < col_end)  // a Pack would be copied word by word
        *reinterpret_cast<uint4*>(matrix + (row + r) * stride + c) =
            *reinterpret_cast<const uint4*>(tile + offset(r, chunk));
    }
  }

  // A of a product: rows [row, row + 16), columns of chunks [chunk, chunk + 2) for 16-bit types.
  static __device__ __forceinline__ void load_lhs(uint32_t (&out)[4], const T* tile, int row,
                                                  int chunk) {
    const int lane = threadIdx.x % 32;
    load_matrix_x4(out, tile + offset(row + lane % 16, chunk + lane / 16));
  }

  // B of two products, out[0 .. 1] and out[2 .. 3], whose columns are the tile's rows
  // [row, row + 8) and the next eight.
  static __device__ __forceinline__ void load_rhs(uint32_t (&out)[4], const T* tile, int row,
                                                  int chunk) {
    const int lane = threadIdx.x % 32;
    load_matrix_x4(out, tile + offset(row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
  }

  // The same where the tile holds the transpose: rows [row, row + 16), columns of chunk and the
  // next.
  static __device__ __forceinline__ void load_rhs_transposed(uint32_t (&out)[4], const T* tile,
                                                             int row, int chunk) {
    const int lane = threadIdx.x % 32;
    load_matrix_x4_transposed(out, tile + offset(row + lane % 16, chunk + lane / 16));
  }
};

// Runs steps [0, count): fill(step, stage) starts the copies of a step, use(step, stage) reads them
// while those of the next one are under way.
template <typename Fill, typename Use>
__device__ __forceinline__ void double_buffered(int64_t count, Fill&& fill, Use&& use) {
  if (count > 0) fill(0, 0);
  copy_async_commit();
  for (int64_t step = 0; step < count; ++step) {
    const int stage = static_cast<int>(step % 2);
    if (step + 1 < count) fill(step + 1, 1 - stage);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    use(step, stage);
    __syncthreads();  // the next step but one fills this stage
  }
  copy_async_wait<0>();
}

}  // namespace fasttune::cuda

// Small kernels, each right with fault = 0 and wrong in a known way with FAULT = its number.
#include "cuda/primitives.cuh"
#include "cuda/reduce.cuh"

namespace {

using namespace fasttune::cuda;

enum Fault : int64_t {
  kNone = 0,
  kMissingBarrier = 1,
  kDivergentBarrier = 2,
  kSharedOutOfBounds = 3,
  kGlobalOutOfBounds = 4,
  kMisaligned = 5,
  kWriteAfterRead = 6,
  kUnwritten = 7,
  kOutsideMask = 8,
  kMissingWait = 9,
  kEndedThread = 10,
  kMissingWarpSync = 11,
  kDeadlock = 12,
  kUnwrittenShared = 13,
  kDynamicOutOfBounds = 14,
};

constexpr int kThreads = 64;

// y[block] = the sum of x[block], through a template's static shared memory.
template <int Warps>
__global__ void sum_kernel(const float* x, float* y, Fault fault) {
  __shared__ float partial[Warps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int beyond = fault == kGlobalOutOfBounds && blockIdx.x == gridDim.x - 1 ? 1 : 0;
  float sum = x[static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x + beyond];
  const unsigned mask = fault == kOutsideMask ? 0xFFFFu : ~0u;
  if (fault != kOutsideMask || lane < 16)
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(mask, sum, offset);
  if (lane == 0 && !(fault == kUnwrittenShared && warp == 1))
    partial[fault == kSharedOutOfBounds ? warp + 1 : warp] = sum;
  if (fault == kDivergentBarrier) {
    if (warp == 0)
      __syncthreads();
    else
      __syncthreads();
  } else if (fault == kEndedThread) {
    if (threadIdx.x == 5) return;
    __syncthreads();
  } else if (fault == kDeadlock) {
    if (warp == 0) __syncwarp(~0u);
    if (lane != 3) __shfl_sync(~0u, sum, 0);
    __syncthreads();
  } else if (fault != kMissingBarrier) {
    __syncthreads();
  }
  if (threadIdx.x == 0 && !(fault == kUnwritten && blockIdx.x == 1)) {
    float total = 0.0f;
    for (int i = 0; i < Warps; ++i) total += partial[i];
    y[blockIdx.x] = total;
  }
}

// y = x reversed within each block, in place in dynamic shared memory after an asynchronous copy.
__global__ void reverse_kernel(const float* x, float* y, Fault fault) {
  FASTTUNE_DYNAMIC_SHARED(float, row);
  const int t = threadIdx.x, n = blockDim.x;
  const float* from = x + static_cast<size_t>(blockIdx.x) * n;
  if (t < n / 4) copy_async_16(row + 4 * t, from + 4 * t);
  copy_async_commit();
  if (fault != kMissingWait) copy_async_wait<0>();
  __syncthreads();
  const float other = row[n - 1 - t];
  if (fault != kWriteAfterRead) __syncthreads();
  row[fault == kDynamicOutOfBounds ? t + 1 : t] = other;
  y[static_cast<size_t>(blockIdx.x) * n + t] = other;
}

// y = x, four elements a thread.
__global__ void copy_kernel(const float* x, float* y) {
  const size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  reinterpret_cast<float4*>(y)[i] = reinterpret_cast<const float4*>(x)[i];
}

// y[i] = x of the neighbour in the warp, through shared memory and __syncwarp.
__global__ void rotate_kernel(const float* x, float* y, Fault fault) {
  __shared__ float values[32];
  values[threadIdx.x] = x[threadIdx.x];
  if (fault != kMissingWarpSync) __syncwarp(~0u);
  y[threadIdx.x] = values[(threadIdx.x + 1) % 32];
}

// y[block] = the sum of x[block]; the shared memory is that of a template with an external name.
__global__ void block_sum_kernel(const float* x, float* y) {
  const float sum = block_sum<kThreads>(x[blockIdx.x * kThreads + threadIdx.x]);
  if (threadIdx.x == kThreads - 1) y[blockIdx.x] = sum;
}

enum WarpFault : int64_t {
  kNotInMask = 1,
  kEndedLane = 2,
  kTwoPlaces = 3,
  kOutstandingCopy = 4,
  kOverflow = 5,
};

// y = the sum of x over a warp, unless broken.
__global__ void warp_sum_kernel(const float* x, float* y, WarpFault fault) {
  __shared__ __align__(16) float row[4];
  float sum = x[threadIdx.x];
  if (fault == kNotInMask) __syncwarp(0xFFFEu);
  if (fault == kEndedLane && threadIdx.x == 7) return;
  if (fault == kTwoPlaces) {
    if (threadIdx.x < 16)
      __syncwarp(~0u);
    else
      __syncwarp(~0u);
  }
  if (fault == kOutstandingCopy && threadIdx.x == 0) {
    copy_async_16(row, x);
    copy_async_commit();
  }
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  const int huge = 0x7FFFFFE0 + static_cast<int>(threadIdx.x);
  y[threadIdx.x] = fault == kOverflow ? static_cast<float>(huge + 1) : sum;
}

// counts[x % 4] of the block's integers.
__global__ void count_kernel(const int* x, int* counts) {
  __shared__ int bins[4];
  if (threadIdx.x < 4) bins[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&bins[x[blockIdx.x * blockDim.x + threadIdx.x] % 4], 1);
  __syncthreads();
  if (threadIdx.x < 4) atomicAdd(&counts[threadIdx.x], bins[threadIdx.x]);
}

// d [16, 8] = a [16, 16] b^T, b [8, 16]: ldmatrix and the tensor cores.
template <typename T>
__global__ void multiply_kernel(const T* a, const T* b, float* d) {
  __shared__ __align__(16) T rows[24 * 16];
  const int lane = threadIdx.x;
  for (int i = lane; i < 24 * 16; i += 32) rows[i] = i < 256 ? a[i] : b[i - 256];
  __syncthreads();
  uint32_t left[4], both[4];
  load_matrix_x4(left, rows + (lane % 16) * 16 + lane / 16 * 8);
  load_matrix_x4(both, rows + 256 + (lane % 8) * 16 + lane / 8 % 2 * 8);
  const uint32_t right[2] = {both[0], both[1]};
  float c[4] = {};
  multiply_16x8x16(c, left, right, T{});
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

}  // namespace

extern "C" void launch_sum(const float* x, float* y, int64_t blocks, int64_t fault) {
  launch(sum_kernel<kThreads / 32>, dim3(blocks), dim3(kThreads), 0, nullptr, x, y, Fault(fault));
}

extern "C" void launch_reverse(const float* x, float* y, int64_t blocks, int64_t fault) {
  launch(reverse_kernel, dim3(blocks), dim3(kThreads), kThreads * sizeof(float), nullptr, x, y,
         Fault(fault));
}

extern "C" void launch_copy(const float* x, float* y, int64_t blocks, int64_t fault) {
  const int64_t offset = fault == kMisaligned ? 1 : 0;
  launch(copy_kernel, dim3(blocks), dim3(kThreads / 4 - offset), 0, nullptr, x + offset, y);
}

extern "C" void launch_rotate(const float* x, float* y, int64_t blocks, int64_t fault) {
  launch(rotate_kernel, dim3(blocks), dim3(32), 0, nullptr, x, y, Fault(fault));
}

extern "C" void launch_block_sum(const float* x, float* y, int64_t blocks) {
  launch(block_sum_kernel, dim3(blocks), dim3(kThreads), 0, nullptr, x, y);
}

extern "C" void launch_warp_sum(const float* x, float* y, int64_t fault) {
  launch(warp_sum_kernel, dim3(1), dim3(32), 0, nullptr, x, y, WarpFault(fault));
}

extern "C" void launch_count(const int* x, int* counts, int64_t blocks) {
  launch(count_kernel, dim3(blocks), dim3(kThreads), 0, nullptr, x, counts);
}

extern "C" void launch_multiply_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
  launch(multiply_kernel<__nv_bfloat16>, dim3(1), dim3(32), 0, nullptr, a, b, d);
}

extern "C" void launch_multiply_fp16(const __half* a, const __half* b, float* d) {
  launch(multiply_kernel<__half>, dim3(1), dim3(32), 0, nullptr, a, b, d);
}

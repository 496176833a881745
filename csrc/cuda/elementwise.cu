#include "cuda/activation.cuh"
#include "cuda/dropout.cuh"
#include "cuda/elements.cuh"
#include "cuda/elementwise.cuh"

// Memory binds: every element is read once and written once, 16 bytes an access where rows allow.
// A thread has eight neighbours, what one counter of dropout draws for. The types are looked up at
// run time, alike for all threads: each operand may have its own.
namespace fasttune::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRun = 8;

template <typename T, int N>
__device__ __forceinline__ void load_as(const Matrix& from, int64_t at, float (&to)[N]) {
  const Pack<T, N> pack = load_pack<N>(static_cast<const T*>(from.data) + at);
  for (int i = 0; i < N; ++i) to[i] = to_float(pack.values[i]);
}

template <int N>
__device__ __forceinline__ void load(const Matrix& from, int64_t row, int64_t col, float (&to)[N]) {
  const int64_t at = row * from.stride + col;
  if (from.dtype == DType::kFloat32) return load_as<float>(from, at, to);
  if (from.dtype == DType::kBFloat16) return load_as<__nv_bfloat16>(from, at, to);
  load_as<__half>(from, at, to);
}

template <typename T, int N>
__device__ __forceinline__ void store_as(const Matrix& to, int64_t at, const float (&from)[N]) {
  Pack<T, N> pack;
  for (int i = 0; i < N; ++i) pack.values[i] = rounded_to<T>(from[i]);
  store_pack(static_cast<T*>(to.data) + at, pack);
}

template <int N>
__device__ __forceinline__ void store(const Matrix& to, int64_t row, int64_t col,
                                      const float (&from)[N]) {
  const int64_t at = row * to.stride + col;
  if (to.dtype == DType::kFloat32) return store_as<float>(to, at, from);
  if (to.dtype == DType::kBFloat16) return store_as<__nv_bfloat16>(to, at, from);
  store_as<__half>(to, at, from);
}

// body(row, col) for the runs of N columns that are this thread's.
template <int N, typename F>
__device__ __forceinline__ void for_own_runs(int64_t rows, int64_t cols, F&& body) {
  const int64_t runs = cols / N, total = rows * runs;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step)
    body(i / runs, i % runs * N);
}

template <typename A, bool Backward, int N>
__global__ void __launch_bounds__(kThreads) bias_activation_kernel(BiasActivation args) {
  for_own_runs<N>(args.rows, args.cols, [&](int64_t row, int64_t col) {
    float z[N], bias[N] = {}, dy[N];
    load(args.x, row, col, z);
    if (args.bias.data) load(args.bias, row, col, bias);
    if (Backward) load(args.dy, row, col, dy);
    for (int i = 0; i < N; ++i) {
      const Jet jet = A::jet(z[i] + bias[i]);
      z[i] = Backward ? dy[i] * jet.slope : jet.value;
    }
    store(args.out, row, col, z);
  });
}

template <int N>
__global__ void __launch_bounds__(kThreads) scaled_sum_kernel(ScaledSum args) {
  const uint64_t seed = args.seed ? static_cast<uint64_t>(*args.seed) : 0;
  for_own_runs<N>(args.rows, args.cols, [&](int64_t row, int64_t col) {
    float sum[N], other[N];
    load(args.x, row, col, sum);
    for (int i = 0; i < N; ++i) sum[i] *= args.scale;
    if (args.column_scale.data) {
      load(args.column_scale, row, col, other);
      for (int i = 0; i < N; ++i) sum[i] *= other[i];
    }
    if (args.seed) {
      const uint32_t kept = keep_bits(seed, args.threshold, 0, static_cast<uint64_t>(row),
                                      static_cast<uint32_t>(col / kRun)) >>
                            (col % kRun);
      for (int i = 0; i < N; ++i)
        if ((kept >> i & 1) == 0) sum[i] = 0.0f;
    }
    if (args.addend.data) {
      load(args.addend, row, col, other);
      for (int i = 0; i < N; ++i) sum[i] += other[i];
    }
    store(args.out, row, col, sum);
  });
}

bool aligned(const Matrix& matrix) {
  return rows_aligned(matrix.data, matrix.stride, size_of(matrix.dtype));
}

}  // namespace

void launch_bias_activation(const BiasActivation& args, Stream stream) {
  if (args.rows * args.cols == 0) return;
  const bool whole = args.cols % kRun == 0 && aligned(args.dy) && aligned(args.x) &&
                     aligned(args.bias) && aligned(args.out);
  with_activation(args.activation, [&](auto activation) {
    using A = decltype(activation);
    auto kernel =
        whole ? bias_activation_kernel<A, false, kRun> : bias_activation_kernel<A, false, 1>;
    if (args.dy.data)
      kernel = whole ? bias_activation_kernel<A, true, kRun> : bias_activation_kernel<A, true, 1>;
    launch(kernel, grid_for(args.rows * args.cols / (whole ? kRun : 1), kThreads), dim3(kThreads),
           0, stream, args);
  });
}

void launch_scaled_sum(const ScaledSum& args, Stream stream) {
  if (args.rows * args.cols == 0) return;
  const bool whole = args.cols % kRun == 0 && aligned(args.x) && aligned(args.addend) &&
                     aligned(args.column_scale) && aligned(args.out);
  const auto kernel = whole ? scaled_sum_kernel<kRun> : scaled_sum_kernel<1>;
  launch(kernel, grid_for(args.rows * args.cols / (whole ? kRun : 1), kThreads), dim3(kThreads), 0,
         stream, args);
}

}  // namespace fasttune::cuda

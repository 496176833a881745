#include "cuda/elements.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rms_norm.cuh"

// Memory binds: a block has a row, reads it twice (the second time from the caches) and writes
// once.
namespace fasttune::cuda {
namespace {

constexpr int kThreads = 256;

template <typename W, int N>
__device__ __forceinline__ void load_scale(const void* weight, float offset, int64_t j,
                                           float (&scale)[N]) {
  if (weight == nullptr) {
    for (int i = 0; i < N; ++i) scale[i] = 1.0f;
    return;
  }
  const Pack<W, N> pack = load_pack<N>(static_cast<const W*>(weight) + j);
  for (int i = 0; i < N; ++i) scale[i] = offset + to_float(pack.values[i]);
}

template <typename X, typename W, typename Y, int N>
__global__ void __launch_bounds__(kThreads) rms_norm_fwd_kernel(RmsNormForward args) {
  const int64_t row = blockIdx.x, begin = threadIdx.x * N, step = kThreads * N;
  const X* x = static_cast<const X*>(args.x) + row * args.x_stride;
  float squares = 0.0f;
  if (args.residual == nullptr) {
    for (int64_t j = begin; j < args.cols; j += step) {
      const Pack<X, N> in = load_pack<N>(x + j);
      for (int i = 0; i < N; ++i) squares += to_float(in.values[i]) * to_float(in.values[i]);
    }
  } else {
    const X* residual = static_cast<const X*>(args.residual) + row * args.residual_stride;
    X* sum = static_cast<X*>(args.sum) + row * args.sum_stride;
    for (int64_t j = begin; j < args.cols; j += step) {
      Pack<X, N> in = load_pack<N>(x + j);
      const Pack<X, N> more = load_pack<N>(residual + j);
      for (int i = 0; i < N; ++i) {
        in.values[i] = rounded_to<X>(to_float(in.values[i]) + to_float(more.values[i]));
        squares += to_float(in.values[i]) * to_float(in.values[i]);
      }
      store_pack(sum + j, in);
    }
    x = sum;  // each thread reads back what it wrote itself
  }
  const float mean = block_sum<kThreads>(squares) / static_cast<float>(args.cols);
  const float rstd = 1.0f / sqrtf(mean + args.eps);  // rsqrtf is off by two units
  if (threadIdx.x == 0) args.rstd[row] = rstd;
  Y* y = static_cast<Y*>(args.y) + row * args.y_stride;
  for (int64_t j = begin; j < args.cols; j += step) {
    const Pack<X, N> in = load_pack<N>(x + j);
    float scale[N];
    load_scale<W>(args.weight, args.weight_offset, j, scale);
    Pack<Y, N> out;
    for (int i = 0; i < N; ++i) {
      float normal = to_float(in.values[i]) * rstd;
      if (args.round_first) normal = to_float(rounded_to<X>(normal));
      out.values[i] = rounded_to<Y>(normal * scale[i]);
    }
    store_pack(y + j, out);
  }
}

// The columns of a thread stay its own over all rows, so its sums of dweight need no barrier.
template <typename G, typename X, typename W, int N>
__global__ void __launch_bounds__(kThreads) rms_norm_bwd_kernel(RmsNormBackward args) {
  const int64_t begin = threadIdx.x * N, step = kThreads * N;
  float* partial = args.partial ? args.partial + blockIdx.x * args.cols : nullptr;
  if (partial)
    for (int64_t j = begin; j < args.cols; j += step)
      for (int i = 0; i < N; ++i) partial[j + i] = 0.0f;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const G* dy = static_cast<const G*>(args.dy) + row * args.dy_stride;
    const X* x = static_cast<const X*>(args.x) + row * args.x_stride;
    const float rstd = args.rstd[row];
    float products = 0.0f;
    for (int64_t j = begin; j < args.cols; j += step) {
      const Pack<G, N> grad = load_pack<N>(dy + j);
      const Pack<X, N> in = load_pack<N>(x + j);
      float scale[N];
      load_scale<W>(args.weight, args.weight_offset, j, scale);
      for (int i = 0; i < N; ++i) {
        const float normal = to_float(in.values[i]) * rstd;
        products += to_float(grad.values[i]) * scale[i] * normal;
        if (partial) partial[j + i] += to_float(grad.values[i]) * normal;
      }
    }
    if (args.dx == nullptr) continue;  // for all threads alike
    const float mean = block_sum<kThreads>(products) / static_cast<float>(args.cols);
    X* dx = static_cast<X*>(args.dx) + row * args.dx_stride;
    const X* addend =
        args.addend ? static_cast<const X*>(args.addend) + row * args.addend_stride : nullptr;
    for (int64_t j = begin; j < args.cols; j += step) {
      const Pack<G, N> grad = load_pack<N>(dy + j);
      const Pack<X, N> in = load_pack<N>(x + j);
      Pack<X, N> more{};
      if (addend) more = load_pack<N>(addend + j);
      float scale[N];
      load_scale<W>(args.weight, args.weight_offset, j, scale);
      Pack<X, N> out;
      for (int i = 0; i < N; ++i) {
        const float normal = to_float(in.values[i]) * rstd;
        const float d = rstd * (to_float(grad.values[i]) * scale[i] - normal * mean);
        out.values[i] = rounded_to<X>(addend ? d + to_float(more.values[i]) : d);
      }
      store_pack(dx + j, out);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    column_sum_kernel(const float* partial, float* out, int64_t blocks, int64_t cols) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= cols) return;
  float sum = 0.0f;
  for (int64_t block = 0; block < blocks; ++block) sum += partial[block * cols + j];
  out[j] = sum;
}

template <typename X>
constexpr int vector_length() {
  return kVectorBytes / sizeof(X);
}

}  // namespace

void launch_rms_norm_fwd(const RmsNormForward& args, Stream stream) {
  if (args.rows == 0) return;
  with_element(args.x_type, [&](auto x) {
    using X = decltype(x);
    constexpr int N = vector_length<X>();
    const bool aligned = args.cols % N == 0 && rows_aligned(args.x, args.x_stride, sizeof(X)) &&
                         rows_aligned(args.residual, args.residual_stride, sizeof(X)) &&
                         rows_aligned(args.sum, args.sum_stride, sizeof(X)) &&
                         rows_aligned(args.y, args.y_stride, size_of(args.y_type)) &&
                         rows_aligned(args.weight, 0, 1);
    with_element_or_float<X>(args.weight_type == DType::kFloat32, [&](auto w) {
      with_element_or_float<X>(args.y_type == DType::kFloat32, [&](auto y) {
        using W = decltype(w);
        using Y = decltype(y);
        const auto kernel =
            aligned ? rms_norm_fwd_kernel<X, W, Y, N> : rms_norm_fwd_kernel<X, W, Y, 1>;
        launch(kernel, dim3(static_cast<unsigned>(args.rows)), dim3(kThreads), 0, stream, args);
      });
    });
  });
}

void launch_rms_norm_bwd(const RmsNormBackward& args, Stream stream) {
  if (args.blocks == 0) return;
  with_element(args.x_type, [&](auto x) {
    using X = decltype(x);
    constexpr int N = vector_length<X>();
    const bool aligned = args.cols % N == 0 && rows_aligned(args.x, args.x_stride, sizeof(X)) &&
                         rows_aligned(args.dy, args.dy_stride, size_of(args.dy_type)) &&
                         rows_aligned(args.addend, args.addend_stride, sizeof(X)) &&
                         rows_aligned(args.dx, args.dx_stride, sizeof(X)) &&
                         rows_aligned(args.weight, 0, 1);
    with_element_or_float<X>(args.dy_type == DType::kFloat32, [&](auto g) {
      with_element_or_float<X>(args.weight_type == DType::kFloat32, [&](auto w) {
        using G = decltype(g);
        using W = decltype(w);
        const auto kernel =
            aligned ? rms_norm_bwd_kernel<G, X, W, N> : rms_norm_bwd_kernel<G, X, W, 1>;
        launch(kernel, dim3(static_cast<unsigned>(args.blocks)), dim3(kThreads), 0, stream, args);
      });
    });
  });
  if (args.dweight)
    launch(column_sum_kernel, dim3(static_cast<unsigned>((args.cols + kThreads - 1) / kThreads)),
           dim3(kThreads), 0, stream, args.partial, args.dweight, args.blocks, args.cols);
}

}  // namespace fasttune::cuda

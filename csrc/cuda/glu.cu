#include "cuda/activation.cuh"
#include "cuda/elements.cuh"
#include "cuda/glu.cuh"

// Memory binds: every element is read once and written once, 16 bytes an access where rows allow.
namespace fasttune::cuda {
namespace {

constexpr int kThreads = 256;

template <typename A, typename T, int N>
__global__ void __launch_bounds__(kThreads) glu_fwd_kernel(GluForward args) {
  const int64_t packs = args.cols / N, total = args.rows * packs;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += step) {
    const int64_t row = i / packs, j = i % packs * N;
    const auto gate = load_pack<N>(static_cast<const T*>(args.gate) + row * args.gate_stride + j);
    const auto up = load_pack<N>(static_cast<const T*>(args.up) + row * args.up_stride + j);
    Pack<T, N> y;
    for (int k = 0; k < N; ++k)
      y.values[k] = rounded_to<T>(A::jet(to_float(gate.values[k])).value * to_float(up.values[k]));
    store_pack(static_cast<T*>(args.y) + row * args.y_stride + j, y);
  }
}

template <typename A, typename T, int N>
__global__ void __launch_bounds__(kThreads) glu_bwd_kernel(GluBackward args) {
  const int64_t packs = args.cols / N, total = args.rows * packs;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += step) {
    const int64_t row = i / packs, j = i % packs * N;
    const auto dy = load_pack<N>(static_cast<const T*>(args.dy) + row * args.dy_stride + j);
    const auto gate = load_pack<N>(static_cast<const T*>(args.gate) + row * args.gate_stride + j);
    const auto up = load_pack<N>(static_cast<const T*>(args.up) + row * args.up_stride + j);
    Pack<T, N> dgate, dup;
    for (int k = 0; k < N; ++k) {
      const Jet a = A::jet(to_float(gate.values[k]));
      const float g = to_float(dy.values[k]);
      dgate.values[k] = rounded_to<T>(g * to_float(up.values[k]) * a.slope);
      dup.values[k] = rounded_to<T>(g * a.value);
    }
    if (args.dgate) store_pack(static_cast<T*>(args.dgate) + row * args.dgate_stride + j, dgate);
    if (args.dup) store_pack(static_cast<T*>(args.dup) + row * args.dup_stride + j, dup);
  }
}

}  // namespace

void launch_glu_fwd(const GluForward& args, Stream stream) {
  if (args.rows * args.cols == 0) return;
  with_element(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int N = kVectorBytes / sizeof(T);
    const bool aligned = args.cols % N == 0 &&
                         rows_aligned(args.gate, args.gate_stride, sizeof(T)) &&
                         rows_aligned(args.up, args.up_stride, sizeof(T)) &&
                         rows_aligned(args.y, args.y_stride, sizeof(T));
    with_activation(args.activation, [&](auto activation) {
      using A = decltype(activation);
      const auto kernel = aligned ? glu_fwd_kernel<A, T, N> : glu_fwd_kernel<A, T, 1>;
      launch(kernel, grid_for(args.rows * args.cols / (aligned ? N : 1), kThreads), dim3(kThreads),
             0, stream, args);
    });
  });
}

void launch_glu_bwd(const GluBackward& args, Stream stream) {
  if (args.rows * args.cols == 0) return;
  with_element(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int N = kVectorBytes / sizeof(T);
    const bool aligned = args.cols % N == 0 && rows_aligned(args.dy, args.dy_stride, sizeof(T)) &&
                         rows_aligned(args.gate, args.gate_stride, sizeof(T)) &&
                         rows_aligned(args.up, args.up_stride, sizeof(T)) &&
                         rows_aligned(args.dgate, args.dgate_stride, sizeof(T)) &&
                         rows_aligned(args.dup, args.dup_stride, sizeof(T));
    with_activation(args.activation, [&](auto activation) {
      using A = decltype(activation);
      const auto kernel = aligned ? glu_bwd_kernel<A, T, N> : glu_bwd_kernel<A, T, 1>;
      launch(kernel, grid_for(args.rows * args.cols / (aligned ? N : 1), kThreads), dim3(kThreads),
             0, stream, args);
    });
  });
}

}  // namespace fasttune::cuda

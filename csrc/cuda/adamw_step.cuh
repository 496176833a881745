// One step of AdamW: the kernel and its launch. A source for each way of storing the parameters
// instantiates it, so that the 42 variants, a second and more each, compile side by side.
//
// Floor: gradient, parameter and two moments are read and three of them written, 28 bytes an fp32
// element, against about 30 operations: memory binds. A thread block has one block of a tensor, so
// the order of every sum depends on the shapes alone.
#pragma once

#include "cuda/adamw_runs.cuh"

namespace fasttune::cuda {

// The numbers of one tensor's step, computed by one thread and rounded once from double.
struct Numbers {
  float weight1, weight2, step_size, inverse_root, eps, decay, factor, unscale;
  uint32_t stream, step;
  bool skip;
};

// By squaring, in fp64: 1 - beta^t cancels in fp32.
__device__ inline double power(double base, uint32_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent /= 2, base *= base)
    if (exponent % 2) result *= base;
  return result;
}

// See csrc/cpu/adamw.cpp.
__device__ inline float towards(float moment, float term, float weight) {
  const bool near_term = weight > 0.5f;
  return (near_term ? term : moment) + (term - moment) * (near_term ? weight - 1.0f : weight);
}

__device__ inline Numbers numbers_of(const AdamWStep& args, const AdamWAddresses& at,
                                     const AdamWFacts& facts) {
  Numbers n;
  n.unscale = args.grad_scale ? 1.0f / *args.grad_scale : 1.0f;
  n.skip = args.found_inf && *args.found_inf != 0.0f;
  float clip = 1.0f;
  if (args.squares) {
    const float norm = sqrtf(static_cast<float>(*args.squares)) * n.unscale;
    clip = args.max_grad_norm / (norm + 1e-6f);
    clip = clip > 1.0f ? 1.0f : clip;  // a NaN stays
    n.skip |= args.skip_nonfinite && !is_finite(bits_of(norm));
  }
  n.factor = n.unscale * clip * args.sign;
  const double lr = at.lr ? *static_cast<const float*>(at.lr) : facts.lr;
  const double decay = at.decay ? *static_cast<const float*>(at.decay) : facts.decay;
  const double step = at.step ? *static_cast<const float*>(at.step) : facts.step;
  n.step = static_cast<uint32_t>(step);
  n.stream = static_cast<uint32_t>(facts.stream);
  n.weight1 = static_cast<float>(1.0 - facts.beta1);
  n.weight2 = static_cast<float>(1.0 - facts.beta2);
  n.step_size = static_cast<float>(lr / (1.0 - power(facts.beta1, n.step)));
  n.inverse_root = static_cast<float>(1.0 / sqrt(1.0 - power(facts.beta2, n.step)));
  n.eps = static_cast<float>(facts.eps);
  n.decay = static_cast<float>(lr * decay);
  return n;
}

// A moment of one thread in fp32, whatever it is stored as.
template <Moments Kind, bool Signed>
struct Moment {
  void* data;
  float* scale;  // of this thread's warp

  __device__ __forceinline__ void load(int64_t first, int64_t numel, bool whole,
                                       float (&out)[kRun]) const {
    if constexpr (Kind == Moments::kFloat32) {
      load_run(static_cast<const float*>(data), first, numel, whole, 0.0f, out);
    } else if constexpr (Kind == Moments::kBFloat16) {
      __nv_bfloat16 run[kRun];
      load_run(static_cast<const __nv_bfloat16*>(data), first, numel, whole, bf16_of(0), run);
      for (int i = 0; i < kRun; ++i) out[i] = to_float(run[i]);
    } else {
      uint8_t run[kRun];
      load_run(static_cast<const uint8_t*>(data), first, numel, whole, uint8_t{0}, run);
      const float own = first < numel ? *scale : 0.0f;
      for (int i = 0; i < kRun; ++i) out[i] = load_code<Signed>(run[i], own);
    }
  }

  // All lanes of a warp must call.
  __device__ __forceinline__ void store(const RandomBits& random, int64_t first, int64_t numel,
                                        bool whole, float (&in)[kRun]) const {
    if constexpr (Kind == Moments::kFloat32) {
      store_run(static_cast<float*>(data), first, numel, whole, in);
    } else {
      uint32_t bits[kRun];
      random.draw(Signed ? kExpAvgBits : kExpAvgSqBits, bits);
      if constexpr (Kind == Moments::kBFloat16) {
        __nv_bfloat16 run[kRun];
        for (int i = 0; i < kRun; ++i) run[i] = rounded_stochastically(in[i], bits[i]);
        store_run(static_cast<__nv_bfloat16*>(data), first, numel, whole, run);
      } else {
        for (int i = 0; i < kRun; ++i)
          if (first + i >= numel) in[i] = 0.0f;
        uint8_t run[kRun];
        const float largest = store_codes<Signed>(in, bits, run);
        store_run(static_cast<uint8_t*>(data), first, numel, whole, run);
        if (threadIdx.x % 32 == 0 && first < numel) *scale = largest;
      }
    }
  }
};

// Two thread blocks a multiprocessor keep 64 KB of loads in flight; with room for three, the
// compiler spills.
template <typename P, typename G, Moments M, Rounding R>
__global__ void __launch_bounds__(kAdamWThreads, 2) adamw_kernel(AdamWStep args) {
  const AdamWBlock block = args.blocks[blockIdx.x];
  const AdamWAddresses& at = args.tensors[block.tensor];
  __shared__ Numbers shared_numbers;
  if (threadIdx.x == 0) shared_numbers = numbers_of(args, at, args.facts[block.tensor]);
  __syncthreads();
  const Numbers n = shared_numbers;
  const G* grad = static_cast<const G*>(at.grad);
  const Parameter<P, R> param{static_cast<P*>(at.param), at.residue};
  const int64_t begin = block.number * kAdamWBlock,
                scales = (at.numel + kQuantised - 1) / kQuantised;
  const bool aligned = is_aligned(grad) && is_aligned(at.param) && is_aligned(at.exp_avg) &&
                       is_aligned(at.exp_avg_sq) && is_aligned(at.max_exp_avg_sq) &&
                       is_aligned(at.residue);
  float grads = 0.0f, updates = 0.0f, params = 0.0f;
  for (int64_t stretch = begin; !n.skip && stretch < begin + kAdamWBlock; stretch += kAdamWStride) {
    const int64_t first = stretch + threadIdx.x * kRun, numel = at.numel;
    const bool whole = aligned && first + kRun <= numel;
    const int64_t warp = first / kQuantised;
    const RandomBits random{args.seed, n.stream, n.step, static_cast<uint32_t>(first / kRun)};
    const Moment<M, true> exp_avg{at.exp_avg, at.scales + warp};
    const Moment<M, false> exp_avg_sq{at.exp_avg_sq, at.scales + scales + warp};
    G raw[kRun];
    float p[kRun], m[kRun], v[kRun];
    load_run(grad, first, numel, whole, rounded_to<G>(0.0f), raw);
    param.load(first, numel, whole, p);
    exp_avg.load(first, numel, whole, m);
    exp_avg_sq.load(first, numel, whole, v);
    for (int i = 0; i < kRun; ++i) {
      const float g = to_float(raw[i]) * n.factor;
      m[i] = towards(m[i], g, n.weight1);
      v[i] = towards(v[i], g * g, n.weight2);
    }
    float kept[kRun];
    for (int i = 0; i < kRun; ++i) kept[i] = v[i];
    if (at.max_exp_avg_sq) {
      const Moment<M, false> top{at.max_exp_avg_sq, nullptr};
      if constexpr (M != Moments::k8Bit) {
        float old[kRun];
        top.load(first, numel, whole, old);
        for (int i = 0; i < kRun; ++i) v[i] = old[i] > v[i] ? old[i] : v[i];
        top.store(random, first, numel, whole, v);
      }
    }
    for (int i = 0; i < kRun; ++i) {
      if (first + i >= numel) continue;
      const float root = sqrtf(v[i]) * n.inverse_root + n.eps;
      const float down = m[i] * n.step_size / root + p[i] * n.decay;
      p[i] -= down;
      grads += to_float(raw[i]) * to_float(raw[i]);
      updates += down * down;
      params += p[i] * p[i];
    }
    param.store(random, first, numel, whole, p);
    exp_avg.store(random, first, numel, whole, m);
    exp_avg_sq.store(random, first, numel, whole, kept);
  }
  const float sums[3] = {block_sum<kAdamWThreads>(grads), block_sum<kAdamWThreads>(updates),
                         block_sum<kAdamWThreads>(params)};
  if (threadIdx.x == 0)
    for (int k = 0; k < 3; ++k) args.partial[blockIdx.x * 3 + k] = sums[k];
  if (!is_last_block(args.counters + block.tensor, block.count)) return;
  const float* mine = args.partial + (blockIdx.x - block.number) * 3;
  for (int k = 0; k < 3; ++k) {
    const double total = ordered_sum(mine + k, block.count, 3);
    if (threadIdx.x != 0) continue;
    const float norm = sqrtf(static_cast<float>(total)) * (k == 0 ? n.unscale : 1.0f);
    args.norms[block.tensor * 3 + k] = n.skip ? float_of(0x7fc00000u) : norm;
  }
}

template <typename P, Rounding R>
void launch_adamw_of(const AdamWStep& args, Stream stream) {
  const auto go = [&](auto kernel) {
    launch(kernel, dim3(static_cast<unsigned>(args.block_count)), dim3(kAdamWThreads), 0, stream,
           args);
  };
  with_element_or_float<P>(args.grad_type == DType::kFloat32, [&](auto g) {
    using G = decltype(g);
    switch (args.moments) {
      case Moments::kFloat32:
        return go(adamw_kernel<P, G, Moments::kFloat32, R>);
      case Moments::kBFloat16:
        return go(adamw_kernel<P, G, Moments::kBFloat16, R>);
      case Moments::k8Bit:
        return go(adamw_kernel<P, G, Moments::k8Bit, R>);
    }
  });
}

template <Rounding R>
void launch_adamw_with(const AdamWStep& args, Stream stream) {
  if constexpr (R == Rounding::kMaster || R == Rounding::kStochastic)
    launch_adamw_of<__nv_bfloat16, R>(args, stream);
  else
    with_element(args.param_type, [&](auto p) { launch_adamw_of<decltype(p), R>(args, stream); });
}

}  // namespace fasttune::cuda

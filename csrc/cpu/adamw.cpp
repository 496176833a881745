#include "adamw.h"

#include <algorithm>
#include <vector>

#include "adamw_storage.h"
#include "register.h"

// Floor per fp32 element: gradient, parameter and two moments are read and three of them written,
// 28 bytes, and the norm reads the gradient once more: 32. Against them stand one root, one
// division and about ten multiply-adds, so memory binds once the tensors leave the caches.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

constexpr int64_t kChunk = kQuantised;
constexpr int64_t kThreadShare = 32768;  // elements below which waking a thread does not pay

// Elements [begin, end) of a tensor, with partial norms of its own.
struct Block {
  int64_t tensor, begin, end;
};

void add_blocks(int64_t tensor, int64_t numel, std::vector<Block>& blocks) {
  for (int64_t at = 0; at < numel; at += kAdamWBlock)
    blocks.push_back({tensor, at, std::min(at + kAdamWBlock, numel)});
}

std::vector<Block> blocks_of(const AdamWAddresses* tensors, int64_t count) {
  std::vector<Block> blocks;
  for (int64_t i = 0; i < count; ++i) add_blocks(i, tensors[i].numel, blocks);
  return blocks;
}

template <typename Body>
void for_each(const std::vector<Block>& blocks, int threads, Body&& body) {
  const int64_t total = static_cast<int64_t>(blocks.size());
  int64_t elements = 0;
  for (const Block& block : blocks) elements += block.end - block.begin;
  const int64_t team = std::min<int64_t>({threads, total, 1 + elements / kThreadShare});
#pragma omp parallel for num_threads(static_cast<int>(std::max<int64_t>(1, team))) schedule(static)
  for (int64_t i = 0; i < total; ++i) body(blocks[i], i);
}

inline vr sqrt(vr v) {
#if defined(__AVX512F__)
  return (vr)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (vr)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kRegisterLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// The numbers of one tensor's step, rounded once from double.
struct Step {
  float weight1, weight2;  // 1 - beta
  float step_size, inverse_root, eps, decay, grad_factor;

  Step(const AdamWFacts& facts, float factor)
      : weight1(static_cast<float>(1 - facts.beta1)),
        weight2(static_cast<float>(1 - facts.beta2)),
        step_size(static_cast<float>(facts.lr / (1 - std::pow(facts.beta1, facts.step)))),
        inverse_root(static_cast<float>(1 / std::sqrt(1 - std::pow(facts.beta2, facts.step)))),
        eps(static_cast<float>(facts.eps)),
        decay(static_cast<float>(facts.lr * facts.decay)),
        grad_factor(factor) {}
};

struct Norms {
  vr grad = {}, update = {}, param = {};
};

// From a moment towards its new term, from the end that is nearer: with beta 0 the term itself,
// which the rounding of a far larger moment would hide.
inline vr towards(vr moment, vr term, float weight) {
  if (weight > 0.5f) return term + (term - moment) * (weight - 1.0f);
  return moment + (term - moment) * weight;
}

// The step on fp32 operands of `count` elements, a multiple of kLanes; top may be null.
template <bool kAmsgrad>
void update(const Step& step, const float* grad, float* param, float* exp_avg, float* exp_avg_sq,
            float* top, int64_t count, Norms& norms) {
  for (int64_t j = 0; j < count; j += kRegisterLanes) {
    const vr raw = load_vr(grad + j), g = raw * step.grad_factor, p = load_vr(param + j);
    vr m = load_vr(exp_avg + j), v = load_vr(exp_avg_sq + j);
    m = towards(m, g, step.weight1);
    v = towards(v, g * g, step.weight2);
    store(exp_avg + j, m);
    store(exp_avg_sq + j, v);
    if constexpr (kAmsgrad) {
      v = max(load_vr(top + j), v);
      store(top + j, v);
    }
    const vr down = m * step.step_size / (sqrt(v) * step.inverse_root + step.eps) + p * step.decay;
    const vr next = p - down;
    store(param + j, next);
    norms.grad += raw * raw;
    norms.update += down * down;
    norms.param += next * next;
  }
}

// One chunk of a tensor in fp32: copies of what is stored otherwise, and of every tail.
struct Chunk {
  alignas(64) float param[kChunk], grad[kChunk], exp_avg[kChunk], exp_avg_sq[kChunk], top[kChunk];
  alignas(64) uint32_t random[kChunk];
};

// `count` elements of a parameter from `first` on, in fp32.
struct Parameter {
  void* data;
  void* residue;
  DType dtype;
  Rounding rounding;

  // In place if it is fp32, whole vectors and has no residue; else as a copy.
  float* load(int64_t first, int64_t count, bool whole, float* copy) const {
    if (whole && dtype == DType::kFloat32 && rounding == Rounding::kNearest)
      return static_cast<float*>(data) + first;
    if (rounding == Rounding::kMaster) {
      load_master(static_cast<uint16_t*>(data) + first, static_cast<int16_t*>(residue) + first,
                  count, copy);
      return copy;
    }
    widen(at(data, first), dtype, count, copy);
    if (rounding == Rounding::kKahan) {
      float rest[kChunk];
      widen(at(residue, first), dtype, count, rest);
      for (int64_t i = 0; i < count; ++i) copy[i] += rest[i];
    }
    return copy;
  }

  // What load() gave as a copy; draws bits for stochastic rounding.
  template <typename Draw>
  void store(int64_t first, int64_t count, const float* copy, Draw&& draw) const {
    switch (rounding) {
      case Rounding::kNearest:
        return narrow(copy, count, dtype, at(data, first));
      case Rounding::kMaster:
        return store_master(copy, count, static_cast<uint16_t*>(data) + first,
                            static_cast<int16_t*>(residue) + first);
      case Rounding::kStochastic:
        return store_stochastic(copy, draw(), count, static_cast<uint16_t*>(data) + first);
      case Rounding::kKahan: {
        narrow(copy, count, dtype, at(data, first));
        float kept[kChunk];
        widen(at(data, first), dtype, count, kept);
        for (int64_t i = 0; i < count; ++i) kept[i] = copy[i] - kept[i];
        return narrow(kept, count, dtype, at(residue, first));
      }
    }
  }

 private:
  void* at(void* start, int64_t first) const {
    return static_cast<char*>(start) + first * size_of(dtype);
  }
};

class Tensor {
 public:
  Tensor(const AdamWAddresses& at, const AdamWFacts& facts, const AdamWCall& call)
      : at_(at),
        call_(call),
        param_{at.param, at.residue, call.param_dtype, call.rounding},
        step_(facts, call.grad_factor),
        random_{call.seed, static_cast<uint32_t>(facts.stream), static_cast<uint32_t>(facts.step)} {
  }

  void run(int64_t first, int64_t count, Chunk& chunk, Norms& norms) {
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    whole_ = padded == count;
    first_ = first;
    count_ = count;
    if (!whole_) pad(chunk);
    const float* grad = load_grad(chunk);
    float* param = param_.load(first, count, whole_, chunk.param);
    float *exp_avg = load_moment<true>(at_.exp_avg, chunk.exp_avg),
          *exp_avg_sq = load_moment<false>(at_.exp_avg_sq, chunk.exp_avg_sq);
    if (at_.max_exp_avg_sq) {
      float* top = load_moment<false>(at_.max_exp_avg_sq, chunk.top);
      update<true>(step_, grad, param, exp_avg, exp_avg_sq, top, padded, norms);
      store_moment<false>(at_.max_exp_avg_sq, chunk.top, top, chunk.random);
    } else {
      update<false>(step_, grad, param, exp_avg, exp_avg_sq, nullptr, padded, norms);
    }
    if (param == chunk.param)
      param_.store(first, count, param, [&] {
        draw(random_, kWeightBits, first, chunk.random);
        return chunk.random;
      });
    store_moment<true>(at_.exp_avg, chunk.exp_avg, exp_avg, chunk.random);
    store_moment<false>(at_.exp_avg_sq, chunk.exp_avg_sq, exp_avg_sq, chunk.random);
  }

 private:
  template <typename T>
  T* element(void* data) const {
    return static_cast<T*>(data) + first_;
  }

  // Lanes behind the tail take part in the arithmetic: they must not divide by 0.
  static void pad(Chunk& chunk) {
    std::fill_n(chunk.param, kChunk, 0.0f);
    std::fill_n(chunk.grad, kChunk, 0.0f);
    std::fill_n(chunk.exp_avg, kChunk, 0.0f);
    std::fill_n(chunk.exp_avg_sq, kChunk, 1.0f);
    std::fill_n(chunk.top, kChunk, 1.0f);
  }

  const float* load_grad(Chunk& chunk) const {
    const char* data = static_cast<const char*>(at_.grad) + first_ * size_of(call_.grad_dtype);
    if (whole_ && call_.grad_dtype == DType::kFloat32) return reinterpret_cast<const float*>(data);
    widen(data, call_.grad_dtype, count_, chunk.grad);
    return chunk.grad;
  }

  // exp_avg is signed, exp_avg_sq and its maximum are not.
  template <bool kSigned>
  float* load_moment(void* data, float* copy) const {
    switch (call_.moments) {
      case Moments::kFloat32:
        if (whole_) return element<float>(data);
        widen(element<float>(data), DType::kFloat32, count_, copy);
        return copy;
      case Moments::kBFloat16:
        widen(element<uint16_t>(data), DType::kBFloat16, count_, copy);
        return copy;
      case Moments::k8Bit:
        Codes<kSigned>::load(element<uint8_t>(data), *scale<kSigned>(), count_, copy);
        return copy;
    }
    return nullptr;
  }

  template <bool kSigned>
  void store_moment(void* data, const float* copy, const float* value, uint32_t* random) const {
    if (value != copy) return;
    if (call_.moments == Moments::kFloat32)
      return narrow(value, count_, DType::kFloat32, element<float>(data));
    draw(random_, kSigned ? kExpAvgBits : kExpAvgSqBits, first_, random);
    if (call_.moments == Moments::kBFloat16)
      return store_stochastic(value, random, count_, element<uint16_t>(data));
    *scale<kSigned>() = Codes<kSigned>::store(value, random, count_, element<uint8_t>(data));
  }

  template <bool kSigned>
  float* scale() const {
    const int64_t blocks = (at_.numel + kQuantised - 1) / kQuantised;
    return at_.scales + first_ / kQuantised + (kSigned ? 0 : blocks);
  }

  const AdamWAddresses& at_;
  const AdamWCall& call_;
  const Parameter param_;
  const Step step_;
  const RandomBits random_;
  int64_t first_ = 0, count_ = 0;
  bool whole_ = true;
};

}  // namespace

void sums_of_squares(const AdamWAddresses* tensors, int64_t count, DType dtype, double* out,
                     int threads) {
  const std::vector<Block> blocks = blocks_of(tensors, count);
  std::vector<double> partial(blocks.size());
  with_element(dtype, [&](auto element) {
    using E = decltype(element);
    for_each(blocks, threads, [&](const Block& block, int64_t index) {
      const auto* data = static_cast<const typename E::type*>(tensors[block.tensor].grad);
      vr sums[4] = {};  // additions of one would wait for each other
      int64_t j = block.begin;
      for (; j + 4 * kRegisterLanes <= block.end; j += 4 * kRegisterLanes)
        for (int i = 0; i < 4; ++i) {
          const vr v = Register<E>::load(data + j + i * kRegisterLanes);
          sums[i] += v * v;
        }
      double total = 0;
      for (; j < block.end; ++j)
        total += static_cast<double>(E::load_one(data + j)) * E::load_one(data + j);
      partial[index] = total + fold_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    });
  });
  std::fill_n(out, count, 0.0);
  for (size_t i = 0; i < blocks.size(); ++i) out[blocks[i].tensor] += partial[i];
}

void adamw_step(const AdamWAddresses* tensors, const AdamWFacts* facts, int64_t count,
                const AdamWCall& call, double* norms, int threads) {
  const std::vector<Block> blocks = blocks_of(tensors, count);
  std::vector<double> partial(3 * blocks.size());
  for_each(blocks, threads, [&](const Block& block, int64_t index) {
    Tensor tensor(tensors[block.tensor], facts[block.tensor], call);
    Chunk chunk;
    Norms sums;
    for (int64_t at = block.begin; at < block.end; at += kChunk)
      tensor.run(at, std::min(kChunk, block.end - at), chunk, sums);
    double* row = &partial[3 * index];
    row[0] = fold_sum(sums.grad);
    row[1] = fold_sum(sums.update);
    row[2] = fold_sum(sums.param);
  });
  std::fill_n(norms, 3 * count, 0.0);
  for (size_t i = 0; i < blocks.size(); ++i)
    for (int k = 0; k < 3; ++k) norms[3 * blocks[i].tensor + k] += partial[3 * i + k];
}

void limit_norms(const AdamWLimit* tensors, const float* norms, int64_t count, DType dtype,
                 Rounding rounding, int threads) {
  std::vector<Block> blocks;
  for (int64_t i = 0; i < count; ++i)
    if (limit_factor(tensors[i], norms + 3 * i) != 1.0f) add_blocks(i, tensors[i].numel, blocks);
  if (rounding == Rounding::kStochastic) rounding = Rounding::kNearest;
  for_each(blocks, threads, [&](const Block& block, int64_t) {
    const AdamWLimit& at = tensors[block.tensor];
    const Parameter param{at.param, at.residue, dtype, rounding};
    const float factor = limit_factor(at, norms + 3 * block.tensor);
    float copy[kChunk];
    for (int64_t first = block.begin; first < block.end; first += kChunk) {
      const int64_t here = std::min(kChunk, block.end - first);
      float* values = param.load(first, here, true, copy);
      for (int64_t i = 0; i < here; ++i) values[i] *= factor;
      if (values == copy) param.store(first, here, copy, [] { return nullptr; });  // draws none
    }
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

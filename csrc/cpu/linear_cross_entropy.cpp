#include "linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "math.h"
#include "simd.h"
#include "threads.h"

// Floor: a row of 49152 bf16 logits is 96 KB and stays in the second-level cache, so the three
// sweeps (maximum; sum of exponentials; gradient) cost one read and one write of memory per logit.
// The exponentials stay there in fp32 for the gradient, which costs less than to compute them
// again, and the next row is asked for while they become one.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

// z = f(logit) and what the gradient needs of f: dz / dlogit = slope(z).
template <bool Capped>
struct Transform {
  float scale, softcap;

  vf apply(vf logit) const {
    const vf z = logit * splat(scale);
    if constexpr (Capped) return tanh(z * splat(1.0f / softcap)) * splat(softcap);
    return z;
  }
  vf slope(vf z) const {
    if constexpr (!Capped) return splat(scale);
    const vf t = z * splat(1.0f / softcap);
    return splat(scale) * (splat(1.0f) - t * t);
  }
};

inline vf exp_of_difference(vf z, float top) {
  return by_registers(z - splat(top), [](vr part) { return exp_nonpositive(part); });
}

// Calls body(j, lanes) for the vectors of [first, end): two at a time as long as there are two
// whole ones, so that one's latencies hide behind the other's. `lanes` is std::true_type for whole
// vectors, which need no masks.
template <typename Body>
inline void sweep(int64_t first, int64_t end, Body&& body) {
  int64_t j = first;
  for (; j + 2 * kLanes <= end; j += 2 * kLanes)
    body(j, std::true_type{}), body(j + kLanes, std::true_type{});
  for (; j + kLanes <= end; j += kLanes) body(j, std::true_type{});
  if (j < end) body(j, std::false_type{});
}

// Lanes [j, V) of a row; zero beyond.
template <typename E, typename Whole>
inline vf load_logits(E, Whole, const typename E::type* row, int64_t j, int64_t vocab) {
  if constexpr (Whole::value) return E::load(row + j);
  vf v = {};
  for (int64_t i = 0; j + i < vocab; ++i) v[i] = E::load_one(row + j + i);
  return v;
}

template <typename E, typename Whole>
inline void store_logits(E, Whole, typename E::type* row, int64_t j, int64_t vocab, vf v) {
  if constexpr (Whole::value) return E::store(row + j, v);
  for (int64_t i = 0; j + i < vocab; ++i) E::store_one(row + j + i, v[i]);
}

// v, with `other` in the lanes beyond V.
template <typename Whole>
inline vf within(Whole, vf v, int64_t j, int64_t vocab, float other) {
  if constexpr (Whole::value) return v;
  constexpr vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select(lane < static_cast<int32_t>(vocab - j), v, splat(other));
}

template <typename E, typename T>
inline float one_logit(E, const typename E::type* row, int64_t j, const T& transform) {
  return transform.apply(splat(E::load_one(row + j)))[0];
}

// `next` is the row that is likely to follow, `exponentials` room for [V].
template <typename E, typename T>
void one_row(E element, typename E::type* row, const typename E::type* next, int64_t vocab,
             int64_t target, const T& transform, const RowLossOptions& options,
             const RowLossOutputs& outputs, float* exponentials, int64_t index) {
  if (target == options.ignore_index) {
    outputs.loss[index] = 0.0f;
    if (outputs.correct) outputs.correct[index] = 0.0f;
    if (outputs.entropy) outputs.entropy[index] = 0.0f;
    if (options.need_grad) std::fill(row, row + vocab, typename E::type{});
    return;
  }
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  constexpr Element<DType::kFloat32> fp32;
  const auto z_at = [&](auto whole, int64_t j) {
    return transform.apply(load_logits(element, whole, row, j, vocab));
  };
  vf best = splat(kLowest);
  sweep(0, vocab, [&](int64_t j, auto whole) {
    best = max(within(whole, z_at(whole, j), j, vocab, kLowest), best);
  });
  const float top = max(best);
  // A partial sum per 4096 logits keeps the fp32 error of a long row near that of a pairwise sum.
  constexpr int64_t kSpan = 4096;
  double sum_of_exponentials = 0, total = 0, weighted = 0;
  const bool need_total = options.label_smoothing != 0.0f, need_weighted = outputs.entropy;
  for (int64_t first = 0; first < vocab; first += kSpan) {
    vf e_sum = {}, z_sum = {}, ez_sum = {};
    sweep(first, std::min(first + kSpan, vocab), [&](int64_t j, auto whole) {
      const vf z = z_at(whole, j);
      const vf e = within(whole, exp_of_difference(z, top), j, vocab, 0.0f);
      if (options.need_grad) store_logits(fp32, whole, exponentials, j, vocab, e);
      e_sum += e;
      if (need_total) z_sum += within(whole, z, j, vocab, 0.0f);
      if (need_weighted) ez_sum += select(e > 0.0f, e * (z - splat(top)), splat(0.0f));
    });
    sum_of_exponentials += sum(e_sum);
    total += sum(z_sum);
    weighted += sum(ez_sum);
  }
  const float lse = top + static_cast<float>(std::log(sum_of_exponentials));
  const float z_target = one_logit(element, row, target, transform);
  const float epsilon = options.label_smoothing;
  float loss = (1.0f - epsilon) * (lse - z_target) + options.z_loss * lse * lse;
  if (need_total) loss += epsilon * (lse - static_cast<float>(total / static_cast<double>(vocab)));
  outputs.loss[index] = loss;
  if (outputs.correct) {
    bool first_of_maxima = z_target == top;
    for (int64_t j = 0; first_of_maxima && j < target; ++j)
      first_of_maxima = one_logit(element, row, j, transform) != top;
    outputs.correct[index] = first_of_maxima ? 1.0f : 0.0f;
  }
  if (outputs.entropy)  // lse - sum p z = log sum e - sum e (z - top) / sum e
    outputs.entropy[index] =
        static_cast<float>(std::log(sum_of_exponentials) - weighted / sum_of_exponentials);
  if (!options.need_grad) return;
  // dloss / dz = p (1 + 2 z_loss lse) - epsilon / V - (1 - epsilon) [target]
  const vf factor =
      splat((1.0f + 2.0f * options.z_loss * lse) / static_cast<float>(sum_of_exponentials));
  const vf smooth = splat(epsilon / static_cast<float>(vocab));
  const float z0_target = E::load_one(row + target);
  sweep(0, vocab, [&](int64_t j, auto whole) {
    const vf z = z_at(whole, j);
    const vf gradient = load_logits(fp32, whole, exponentials, j, vocab) * factor - smooth;
    __builtin_prefetch(next + j, 0, 2);
    store_logits(element, whole, row, j, vocab, gradient * transform.slope(z));
  });
  const vf z = transform.apply(splat(z0_target));
  const vf gradient = splat(exponentials[target]) * factor - smooth - splat(1.0f - epsilon);
  E::store_one(row + target, (gradient * transform.slope(z))[0]);
}

}  // namespace

void cross_entropy_rows(const MutableMatrix& logits, const int64_t* targets,
                        const RowLossOptions& options, const RowLossOutputs& outputs, int threads) {
  const auto rows = [&](auto element, auto transform) {
    using E = decltype(element);
    const int team =
        static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, logits.rows)));
#pragma omp parallel for num_threads(team) schedule(dynamic, 4)
    for (int64_t i = 0; i < logits.rows; ++i) {
      auto* row = static_cast<typename E::type*>(logits.data) + i * logits.stride;
      const auto* next = i + 1 < logits.rows ? row + logits.stride : row;
      float* exponentials =
          options.need_grad ? outputs.exponentials + thread_index() * logits.cols : nullptr;
      one_row(element, row, next, logits.cols, targets[i], transform, options, outputs,
              exponentials, i);
    }
  };
  with_element(logits.dtype, [&](auto element) {
    if (options.softcap > 0)
      return rows(element, Transform<true>{options.logit_scale, options.softcap});
    rows(element, Transform<false>{options.logit_scale, options.softcap});
  });
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

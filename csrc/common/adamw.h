// The tables of an AdamW step, shared by CPU and CUDA code: a row for each tensor.
// fasttune_kernels/adamw_tables.py names the same columns.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/philox.h"

namespace fasttune {

struct AdamWAddresses {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null: no amsgrad
  void* residue;  // what a 16-bit parameter is short of: low bits of a master, or Kahan's sum
  float* scales;  // [2, blocks]: those of 8-bit exp_avg, then of exp_avg_sq
  int64_t numel;
  const void *lr, *decay, *step;  // fp32 scalars on the device of the parameters, or null
};

struct AdamWFacts {
  double lr, beta1, beta2, eps, decay, step, stream;
};

// A parameter whose norm has a limit, infinite if it has none.
struct AdamWLimit {
  void* param;
  void* residue;  // as in AdamWAddresses
  int64_t numel;
  double limit;
};

// What scales a parameter down to its limit. norms: of its gradient, update and parameter, as a
// step returns them; a norm that is not finite scales nothing.
FASTTUNE_HOST_DEVICE inline float limit_factor(const AdamWLimit& at, const float* norms) {
  const float limit = static_cast<float>(at.limit), norm = norms[2];
  return norm > limit && norm - norm == 0.0f ? limit / norm : 1.0f;
}

enum class Moments : int { kFloat32 = 0, kBFloat16 = 1, k8Bit = 2 };
enum class Rounding : int { kNearest = 0, kMaster = 1, kStochastic = 2, kKahan = 3 };

constexpr int64_t kAdamWBlock = 8192;  // elements that one partial norm covers
constexpr int64_t kQuantised = 256;    // elements that share a scale of 8-bit moments

// The random bits of element k have the counter (k / 8, stream, step, purpose).
enum BitsPurpose : uint32_t { kWeightBits = 0, kExpAvgBits = 1, kExpAvgSqBits = 2 };

// 8-bit moments (adamw_tables.py): the code is the top of an fp32 pattern, less the smallest one's.
constexpr int kCodeShift = 20;
template <bool Signed>
constexpr uint32_t kLowestCode = (127u - (Signed ? 15u : 31u)) << 3;

}  // namespace fasttune

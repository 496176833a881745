// Runs an elementwise kernel over matrices: pieces for the threads, tails, operands of several
// dtypes. Every element depends on its own operands only, so no split changes a result.
#pragma once

#include "activation.h"
#include "simd.h"

namespace fasttune::cpu::FASTTUNE_ISA {

// `vectors` * kLanes elements of each operand; absent ones are null.
using PieceKernel = void (*)(const void* const* in, void* const* out, int64_t vectors);

// One kernel, built for the dtype of the operands and for fp32, which takes tails and the pieces
// of operands that differ in dtype, converted.
struct PieceKernels {
  PieceKernel direct;  // null if the dtypes differ
  PieceKernel fp32;
};

struct Elementwise {
  static constexpr int kInputs = 3, kOutputs = 2;

  int64_t rows, cols;
  Matrix in[kInputs] = {};            // null data: absent
  MutableMatrix out[kOutputs] = {};   // likewise
  const float* row_vector = nullptr;  // [cols] fp32 or null; the kernel finds it in in[kInputs]

  // The kernel that `pick(act, element)` returns for these operands.
  template <typename Pick>
  PieceKernels kernels(Activation activation, Pick&& pick) const {
    PieceKernels found = {};
    with_activation(activation, [&](auto act) {
      found.fp32 = pick(act, Element<DType::kFloat32>{});
      if (same_dtype())
        with_element(in[0].dtype, [&](auto element) { found.direct = pick(act, element); });
    });
    return found;
  }
  void run(const PieceKernels& kernels, int threads) const;

 private:
  bool same_dtype() const;
  bool flat() const;
};

}  // namespace fasttune::cpu::FASTTUNE_ISA

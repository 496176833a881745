// The extension module fasttune._cuda: addresses, sizes and codes in, no logic. _native validates.
// Arguments in the order of the structs of csrc/cuda, the stream last.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "cuda/adamw.cuh"
#include "cuda/elementwise.cuh"
#include "cuda/glu.cuh"
#include "cuda/lora.cuh"
#include "cuda/rms_norm.cuh"

namespace py = pybind11;
using namespace fasttune;
using namespace fasttune::cuda;

namespace {

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
Stream stream(uintptr_t handle) { return reinterpret_cast<Stream>(handle); }

// A branch: addresses, then numbers, in the order of its struct.
using DownBranch = std::tuple<uintptr_t, uintptr_t, uintptr_t, float, int, uint32_t, uint32_t>;
using GradientBranch = std::tuple<uintptr_t, uintptr_t, uintptr_t, int, uint32_t, uint32_t>;

LoraDownBranch as_struct(const DownBranch& b) {
  const auto [a, scale_tensor, seed, scale, rank, threshold, stream] = b;
  return {pointer(a), pointer<float>(scale_tensor), pointer<int64_t>(seed), scale, rank, threshold,
          stream};
}
LoraGradientBranch as_struct(const GradientBranch& b) {
  const auto [d, a, seed, rank, threshold, stream] = b;
  return {pointer<float>(d), pointer(a), pointer<int64_t>(seed), rank, threshold, stream};
}

// Address, stride, type.
using MatrixTuple = std::tuple<uintptr_t, int64_t, int>;

Matrix as_struct(const MatrixTuple& m) {
  const auto [data, stride, dtype] = m;
  return {pointer(data), stride, DType(dtype)};
}

template <typename Args, typename Branch>
Args with_branches(Args args, const std::vector<Branch>& branches) {
  if (branches.size() > kGroupBranches) throw std::invalid_argument("more than kGroupBranches");
  args.count = static_cast<int>(branches.size());
  for (size_t j = 0; j < branches.size(); ++j) args.branches[j] = as_struct(branches[j]);
  return args;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("why_no_device", &why_no_device);
  m.attr("TARGETS") = FASTTUNE_CUDA_TARGETS;

  m.def(
      "rms_norm_fwd",
      [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t y, uintptr_t sum,
         uintptr_t rstd, int64_t rows, int64_t cols, int64_t x_stride, int64_t residual_stride,
         int64_t y_stride, int64_t sum_stride, int x_type, int weight_type, int y_type, float eps,
         float weight_offset, bool round_first, uintptr_t handle) {
        launch_rms_norm_fwd(
            {pointer(x), pointer(residual), pointer(weight), pointer(y), pointer(sum),
             pointer<float>(rstd), rows, cols, x_stride, residual_stride, y_stride, sum_stride,
             DType(x_type), DType(weight_type), DType(y_type), eps, weight_offset, round_first},
            stream(handle));
      },
      release());
  m.def(
      "rms_norm_bwd",
      [](uintptr_t dy, uintptr_t x, uintptr_t weight, uintptr_t rstd, uintptr_t addend,
         uintptr_t dx, uintptr_t partial, uintptr_t dweight, int64_t rows, int64_t cols,
         int64_t dy_stride, int64_t x_stride, int64_t addend_stride, int64_t dx_stride,
         int64_t blocks, int dy_type, int x_type, int weight_type, float weight_offset,
         uintptr_t handle) {
        launch_rms_norm_bwd(
            {pointer(dy), pointer(x), pointer(weight), pointer<float>(rstd), pointer(addend),
             pointer(dx), pointer<float>(partial), pointer<float>(dweight), rows, cols, dy_stride,
             x_stride, addend_stride, dx_stride, blocks, DType(dy_type), DType(x_type),
             DType(weight_type), weight_offset},
            stream(handle));
      },
      release());

  m.def(
      "glu_fwd",
      [](uintptr_t gate, uintptr_t up, uintptr_t y, int64_t rows, int64_t cols, int64_t gate_stride,
         int64_t up_stride, int64_t y_stride, int dtype, int activation, uintptr_t handle) {
        launch_glu_fwd({pointer(gate), pointer(up), pointer(y), rows, cols, gate_stride, up_stride,
                        y_stride, DType(dtype), Activation(activation)},
                       stream(handle));
      },
      release());
  m.def(
      "glu_bwd",
      [](uintptr_t dy, uintptr_t gate, uintptr_t up, uintptr_t dgate, uintptr_t dup, int64_t rows,
         int64_t cols, int64_t dy_stride, int64_t gate_stride, int64_t up_stride,
         int64_t dgate_stride, int64_t dup_stride, int dtype, int activation, uintptr_t handle) {
        launch_glu_bwd({pointer(dy), pointer(gate), pointer(up), pointer(dgate), pointer(dup), rows,
                        cols, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride,
                        DType(dtype), Activation(activation)},
                       stream(handle));
      },
      release());

  m.def(
      "bias_activation",
      [](const MatrixTuple& dy, const MatrixTuple& x, const MatrixTuple& bias,
         const MatrixTuple& out, int64_t rows, int64_t cols, int activation, uintptr_t handle) {
        launch_bias_activation({as_struct(dy), as_struct(x), as_struct(bias), as_struct(out), rows,
                                cols, Activation(activation)},
                               stream(handle));
      },
      release());
  m.def(
      "scaled_sum",
      [](const MatrixTuple& x, const MatrixTuple& addend, const MatrixTuple& column_scale,
         const MatrixTuple& out, int64_t rows, int64_t cols, uintptr_t seed, uint32_t threshold,
         float scale, uintptr_t handle) {
        launch_scaled_sum({as_struct(x), as_struct(addend), as_struct(column_scale), as_struct(out),
                           rows, cols, pointer<int64_t>(seed), threshold, scale},
                          stream(handle));
      },
      release());

  m.def(
      "grad_norm",
      [](uintptr_t tensors, uintptr_t blocks, int64_t block_count, uintptr_t partial,
         uintptr_t counter, uintptr_t out, int grad_type, uintptr_t handle) {
        launch_grad_norm({pointer<const AdamWAddresses>(tensors), pointer<const AdamWBlock>(blocks),
                          block_count, pointer<float>(partial), pointer<int>(counter),
                          pointer<double>(out), DType(grad_type)},
                         stream(handle));
      },
      release());
  m.def(
      "adamw",
      [](uintptr_t tensors, uintptr_t facts, uintptr_t blocks, int64_t block_count,
         uintptr_t partial, uintptr_t counters, uintptr_t norms, uintptr_t squares,
         uintptr_t grad_scale, uintptr_t found_inf, float max_grad_norm, float sign,
         bool skip_nonfinite, uint64_t seed, int param_type, int grad_type, int moments,
         int rounding, uintptr_t handle) {
        launch_adamw({pointer<const AdamWAddresses>(tensors), pointer<const AdamWFacts>(facts),
                      pointer<const AdamWBlock>(blocks), block_count, pointer<float>(partial),
                      pointer<int>(counters), pointer<float>(norms), pointer<const double>(squares),
                      pointer<const float>(grad_scale), pointer<const float>(found_inf),
                      max_grad_norm, sign, skip_nonfinite, seed, DType(param_type),
                      DType(grad_type), Moments(moments), Rounding(rounding)},
                     stream(handle));
      },
      release());

  m.def(
      "limit_norms",
      [](uintptr_t tensors, uintptr_t blocks, int64_t block_count, uintptr_t norms, int param_type,
         int rounding, uintptr_t handle) {
        launch_limit_norms(
            {pointer<const AdamWLimit>(tensors), pointer<const AdamWBlock>(blocks), block_count,
             pointer<const float>(norms), DType(param_type), Rounding(rounding)},
            stream(handle));
      },
      release());
  m.def(
      "lora_down",
      [](uintptr_t x, uintptr_t t, uintptr_t partial, int64_t rows, int64_t cols, int64_t x_stride,
         int64_t cols_per_split, int64_t splits, bool transposed,
         const std::vector<DownBranch>& branches, int dtype, uintptr_t handle) {
        const LoraDown args{pointer(x),
                            pointer<float>(t),
                            pointer<float>(partial),
                            rows,
                            cols,
                            x_stride,
                            cols_per_split,
                            splits,
                            0,
                            0,
                            transposed,
                            {},
                            DType(dtype)};
        launch_lora_down(with_branches(args, branches), stream(handle));
      },
      release());
  m.def(
      "lora_up",
      [](uintptr_t t, uintptr_t b, uintptr_t bias, uintptr_t y, int64_t rows, int64_t cols,
         int64_t rank, int64_t y_stride, int dtype, uintptr_t handle) {
        launch_lora_up({pointer<float>(t), pointer(b), pointer<float>(bias), pointer(y), rows, cols,
                        rank, y_stride, DType(dtype)},
                       stream(handle));
      },
      release());
  m.def(
      "lora_input_gradient",
      [](uintptr_t dx, int64_t rows, int64_t cols, int64_t dx_stride,
         const std::vector<GradientBranch>& branches, int dtype, uintptr_t handle) {
        const LoraInputGradient args{pointer(dx), rows, cols, dx_stride, 0, 0, {}, DType(dtype)};
        launch_lora_input_gradient(with_branches(args, branches), stream(handle));
      },
      release());
  m.def(
      "lora_weight_gradient",
      [](uintptr_t x, uintptr_t out, uintptr_t partial, int64_t rows, int64_t cols,
         int64_t x_stride, int64_t rows_per_split, int64_t splits, bool transposed,
         const std::vector<GradientBranch>& branches, int dtype, uintptr_t handle) {
        const LoraWeightGradient args{pointer(x),
                                      pointer<float>(out),
                                      pointer<float>(partial),
                                      rows,
                                      cols,
                                      x_stride,
                                      rows_per_split,
                                      splits,
                                      0,
                                      0,
                                      transposed,
                                      {},
                                      DType(dtype)};
        launch_lora_weight_gradient(with_branches(args, branches), stream(handle));
      },
      release());
}

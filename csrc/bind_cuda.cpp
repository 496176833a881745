// The extension module fasttune._cuda: addresses, sizes and codes in, no logic. _native validates.
// Arguments in the order of the structs of csrc/cuda, the stream last.
#include <pybind11/pybind11.h>

#include "cuda/adamw.cuh"
#include "cuda/glu.cuh"
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
}

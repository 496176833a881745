// The extension module fasttune._cpu: addresses, sizes and codes in, no logic. _native.py
// validates.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

namespace py = pybind11;
using namespace fasttune;
using namespace fasttune::cpu;

namespace {

Matrix matrix(uintptr_t data, int64_t rows, int64_t cols, int64_t stride, int dtype) {
  return {reinterpret_cast<const void*>(data), rows, cols, stride, static_cast<DType>(dtype)};
}
MutableMatrix mutable_matrix(uintptr_t data, int64_t rows, int64_t cols, int64_t stride,
                             int dtype) {
  return {reinterpret_cast<void*>(data), rows, cols, stride, static_cast<DType>(dtype)};
}
template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<Matrix>(m, "Matrix").def(py::init(&matrix));
  py::class_<MutableMatrix>(m, "MutableMatrix").def(py::init(&mutable_matrix));
  py::class_<Dropout>(m, "Dropout")
      .def(py::init([](uint64_t seed, uint32_t threshold, uint32_t branch, uint64_t row_offset) {
        return Dropout{seed, threshold, branch, row_offset};
      }));

  m.def("isa_name", &isa_name);
  m.def("isa_available", &isa_available);
  m.def("set_isa", &set_isa);
  m.def("has_fast_bf16_dot", &has_fast_bf16_dot);

  m.def(
      "convert",
      [](const Matrix& src, const MutableMatrix& dst, int threads) {
        kernels().convert(src, dst, threads);
      },
      release());
  m.def(
      "lora_reduce",
      [](const Matrix& x, uintptr_t panel, int64_t rank, float scale, const Dropout& dropout,
         uintptr_t out, int threads) {
        kernels().lora_reduce(x, pointer<const float>(panel), rank, scale, dropout,
                              pointer<float>(out), threads);
      },
      release());
  m.def(
      "lora_outer",
      [](const Matrix& x, uintptr_t t, int64_t rank, const Dropout& dropout,
         const MutableMatrix& out, bool transposed, int threads) {
        kernels().lora_outer(x, pointer<const float>(t), rank, dropout, out, transposed, threads);
      },
      release());
  m.def(
      "lora_expand",
      [](uintptr_t t, uintptr_t panel, int64_t rank, uintptr_t addend, int64_t addend_stride,
         uintptr_t bias, const Dropout& dropout, const MutableMatrix& out, int threads) {
        const ExpandTerms terms{pointer<const float>(addend), addend_stride,
                                pointer<const float>(bias)};
        kernels().lora_expand(pointer<const float>(t), pointer<const float>(panel), rank, terms,
                              dropout, out, threads);
      },
      release());
  m.def(
      "cross_entropy_rows",
      [](const MutableMatrix& logits, uintptr_t targets, int64_t ignore_index, float logit_scale,
         float softcap, float label_smoothing, float z_loss, bool need_grad, uintptr_t loss,
         uintptr_t correct, uintptr_t entropy, int threads) {
        const RowLossOptions options{ignore_index,    logit_scale, softcap,
                                     label_smoothing, z_loss,      need_grad};
        const RowLossOutputs outputs{pointer<float>(loss), pointer<float>(correct),
                                     pointer<float>(entropy)};
        kernels().cross_entropy_rows(logits, pointer<const int64_t>(targets), options, outputs,
                                     threads);
      },
      release());
}

// The extension module fasttune._cpu: tensors, addresses and codes in, no logic. fasttune/_native
// validates.
#include "bind_cpu.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/attention_plan.h"
#include "cpu/isa.h"
#include "tensors.h"

namespace py = pybind11;
using namespace fasttune;
using namespace fasttune::cpu;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// What is not wanted comes without data.
MutableMatrix or_absent(const MutableMatrix* out, const Matrix& like) {
  return out == nullptr ? MutableMatrix{nullptr, like.rows, like.cols, 0, like.dtype} : *out;
}

// A run with the reduction that it names.
struct BoundRun {
  Run run;
  std::optional<Reduction> reduction;
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("use_tensors", &Tensors::use);
  py::class_<Dropout>(m, "Dropout")
      .def(py::init([](uint64_t seed, uint32_t threshold, uint32_t branch, uint64_t row_offset) {
        return Dropout{seed, threshold, branch, row_offset, nullptr, 0};
      }))
      .def("drawn", [](Dropout dropout, uintptr_t words, int64_t stride) {
        dropout.drawn = pointer<const uint64_t>(words);
        dropout.drawn_stride = stride;
        return dropout;
      });
  py::class_<NormVector>(m, "NormVector")
      .def(py::init([](uintptr_t data, int dtype, float offset, uintptr_t buffer) {
        return NormVector{pointer<const void>(data), static_cast<DType>(dtype), offset,
                          pointer<float>(buffer)};
      }));
  py::class_<ColumnSums>(m, "ColumnSums")
      .def(py::init([](uintptr_t out, uintptr_t partial, int64_t chunks) {
        return ColumnSums{pointer<float>(out), pointer<float>(partial), chunks};
      }));

  // Fields in the order of kernels.h.
  py::class_<ReftCall>(m, "ReftCall")
      .def(py::init([](uintptr_t rows, int64_t count, int64_t rank, int64_t stride,
                       uintptr_t rotation, uintptr_t source, uintptr_t bias, bool difference,
                       int activation, const Dropout& dropout, float scale) {
        return ReftCall{pointer<const int64_t>(rows),
                        count,
                        rank,
                        stride,
                        pointer<const float>(rotation),
                        pointer<const float>(source),
                        pointer<const float>(bias),
                        difference,
                        activation,
                        dropout,
                        scale};
      }));
  py::class_<Heads>(m, "Heads")
      .def(py::init([](uintptr_t data, int64_t batch, int64_t head, int64_t row) {
        return Heads{pointer<const void>(data), batch, head, row};
      }));
  py::class_<MutableHeads>(m, "MutableHeads")
      .def(py::init([](uintptr_t data, int64_t batch, int64_t head, int64_t row) {
        return MutableHeads{pointer<void>(data), batch, head, row};
      }));
  py::class_<AttentionMask>(m, "AttentionMask")
      .def(py::init([](uintptr_t data, int64_t batch, int64_t head, int64_t row, int64_t key,
                       int kind, int dtype) {
        return AttentionMask{
            pointer<const void>(data), batch, head, row, key, static_cast<MaskKind>(kind),
            static_cast<DType>(dtype)};
      }));
  py::class_<AttentionShape>(m, "AttentionShape")
      .def(py::init([](int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries,
                       int64_t keys, int64_t width, int dtype, float scale, bool causal) {
        return AttentionShape{
            batch, heads, kv_heads, queries, keys, width, static_cast<DType>(dtype), scale, causal};
      }));
  m.def("attention_forward_scratch", &attention_forward_scratch);
  m.def("attention_backward_scratch", &attention_backward_scratch);
  py::class_<RopeOperand>(m, "RopeOperand")
      .def(py::init([](uintptr_t x, uintptr_t y, int64_t heads, int64_t x_batch, int64_t x_head,
                       int64_t x_position, int64_t y_batch, int64_t y_head, int64_t y_position,
                       int dtype) {
        return RopeOperand{pointer<const void>(x),
                           pointer<void>(y),
                           heads,
                           x_batch,
                           x_head,
                           x_position,
                           y_batch,
                           y_head,
                           y_position,
                           static_cast<DType>(dtype)};
      }));
  py::class_<Reduction>(m, "Reduction")
      .def(py::init([](uintptr_t panel, float scale, const Dropout& dropout, uintptr_t out) {
        return Reduction{pointer<const float>(panel), scale, dropout, pointer<float>(out)};
      }));
  py::class_<BoundRun>(m, "Run").def(
      py::init([](int64_t first, int64_t end, uintptr_t t, const Reduction* reduction,
                  uintptr_t panel, int64_t rank, uintptr_t bias, const Dropout& dropout) {
        BoundRun bound{{first, end, pointer<const float>(t), nullptr, pointer<const float>(panel),
                        rank, pointer<const float>(bias), dropout},
                       {}};
        if (reduction) bound.reduction = *reduction;
        return bound;
      }));
  py::class_<RopeTables>(m, "RopeTables")
      .def(py::init([](uintptr_t cos, uintptr_t sin, int64_t cos_batch, int64_t cos_position,
                       int64_t sin_batch, int64_t sin_position, int dtype) {
        return RopeTables{pointer<const void>(cos),
                          pointer<const void>(sin),
                          cos_batch,
                          cos_position,
                          sin_batch,
                          sin_position,
                          static_cast<DType>(dtype)};
      }));

  m.def("isa_name", &isa_name);
  m.def("isa_available", &isa_available);
  m.def("set_isa", &set_isa);
  m.def("has_fast_bf16_dot", &has_fast_bf16_dot);

  m.attr("DEEP_SUMS") = kDeepSums;
  m.attr("LANES") = kLanes;
  m.attr("SUM_ROWS") = kSumRows;
  m.attr("ACTIVATIONS") = py::tuple(py::cast(std::vector<std::string>(
      std::begin(kActivationNames), std::end(kActivationNames))));  // by code

  m.def(
      "convert",
      [](const Matrix& src, const MutableMatrix& dst, int threads) {
        kernels().convert(src, dst, threads);
      },
      release());
  m.def(
      "transpose",
      [](const Matrix& src, uintptr_t dst, int64_t stride, int threads) {
        kernels().transpose(src, pointer<float>(dst), stride, threads);
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
      "draw",
      [](const Dropout& dropout, int64_t rows, int64_t cols, uintptr_t bits, int threads) {
        kernels().draw(dropout, rows, cols, pointer<uint64_t>(bits), threads);
      },
      release());
  m.def(
      "drop",
      [](const Matrix& x, const Dropout& dropout, const MutableMatrix& out, int threads) {
        kernels().drop(x, dropout, out, threads);
      },
      release());
  m.def(
      "lora_expand",
      [](uintptr_t t, uintptr_t panel, int64_t rank, const Matrix* addend, uintptr_t addend_scale,
         uintptr_t bias, const Dropout& dropout, const MutableMatrix& out, int threads) {
        const ExpandTerms terms{addend, pointer<const float>(addend_scale),
                                pointer<const float>(bias)};
        kernels().lora_expand(pointer<const float>(t), pointer<const float>(panel), rank, terms,
                              dropout, out, threads);
      },
      release());
  m.def("has_base_product", [] { return kernels().base_product != nullptr; });
  m.def(
      "base_product",
      [](const Matrix& x, const Matrix& w, bool transposed, const std::vector<BoundRun>& runs,
         const Matrix* addend, const MutableMatrix* kept, uintptr_t scale, const MutableMatrix& out,
         int threads) {
        std::vector<Run> own;
        for (const BoundRun& bound : runs) {
          own.push_back(bound.run);
          if (bound.reduction) own.back().reduction = &*bound.reduction;
        }
        const ScaledProduct product{pointer<const float>(scale), kept};
        kernels().base_product(x, w, transposed, own.data(), static_cast<int64_t>(own.size()),
                               addend, scale ? &product : nullptr, out, threads);
      },
      release());
  m.def(
      "deep_product",
      [](const Matrix& x, const Matrix& w, bool transposed, const MutableMatrix& out,
         uintptr_t partial, int threads) {
        kernels().deep_product(x, w, transposed, out, pointer<float>(partial), threads);
      },
      release());
  bind_bottleneck(m);
  bind_lora_runs(m);
  m.def(
      "cross_entropy_rows",
      [](const MutableMatrix& logits, uintptr_t targets, int64_t ignore_index, float logit_scale,
         float softcap, float label_smoothing, float z_loss, bool need_grad, uintptr_t loss,
         uintptr_t correct, uintptr_t entropy, uintptr_t exponentials, int threads) {
        const RowLossOptions options{ignore_index,    logit_scale, softcap,
                                     label_smoothing, z_loss,      need_grad};
        const RowLossOutputs outputs{pointer<float>(loss), pointer<float>(correct),
                                     pointer<float>(entropy), pointer<float>(exponentials)};
        kernels().cross_entropy_rows(logits, pointer<const int64_t>(targets), options, outputs,
                                     threads);
      },
      release());
  m.def(
      "scaled_sum",
      [](const Matrix& x, const Matrix* addend, uintptr_t column_scale, float scale,
         const Dropout& dropout, const MutableMatrix& out, int threads) {
        kernels().scaled_sum(x, addend, pointer<const float>(column_scale), scale, dropout, out,
                             threads);
      },
      release());
  m.def(
      "ia3_scale_backward",
      [](const Matrix& dy, const Matrix& x, uintptr_t scale, const MutableMatrix* dx,
         const ColumnSums& dscale, int threads) {
        kernels().ia3_scale_backward(dy, x, pointer<const float>(scale), dx, dscale, threads);
      },
      release());
  m.def(
      "row_norms",
      [](const Matrix& w, uintptr_t panel, int64_t rank, uintptr_t b, uintptr_t through,
         float scale, uintptr_t out, const Matrix* x, const MutableMatrix* product, int threads) {
        kernels().row_norms(w, pointer<const float>(panel), rank, pointer<const float>(b),
                            pointer<const float>(through), scale, pointer<float>(out), x, product,
                            threads);
      },
      release());
  m.def(
      "scaled_glu_forward",
      [](const Matrix& gate, const Matrix& up, uintptr_t scale, const MutableMatrix& y,
         int activation, int threads) {
        kernels().scaled_glu_forward(gate, up, pointer<const float>(scale), y,
                                     static_cast<Activation>(activation), threads);
      },
      release());
  m.def(
      "scaled_glu_backward",
      [](const Matrix& dy, const Matrix& gate, const Matrix& up, uintptr_t scale,
         const MutableMatrix* dgate, const MutableMatrix* dup, const ColumnSums& dscale,
         int activation, int threads) {
        kernels().scaled_glu_backward(dy, gate, up, pointer<const float>(scale),
                                      or_absent(dgate, dy), or_absent(dup, dy), dscale,
                                      static_cast<Activation>(activation), threads);
      },
      release());
  m.def(
      "reft_forward",
      [](const Matrix& h, const ReftCall& call, const MutableMatrix& y, const MutableMatrix* x,
         uintptr_t z, uintptr_t d, int threads) {
        kernels().reft_forward(h, call, y, x, pointer<float>(z), pointer<float>(d), threads);
      },
      release());
  m.def(
      "reft_backward",
      [](const Matrix& dy, const ReftCall& call, uintptr_t z, const MutableMatrix* dh,
         const MutableMatrix* g, uintptr_t dz, uintptr_t dd, int threads) {
        kernels().reft_backward(dy, call, pointer<const float>(z), dh, g, pointer<float>(dz),
                                pointer<float>(dd), threads);
      },
      release());
  m.def(
      "glu_forward",
      [](const Matrix& gate, const Matrix& up, const MutableMatrix& y, int activation,
         int threads) {
        kernels().glu_forward(gate, up, y, static_cast<Activation>(activation), threads);
      },
      release());
  m.def(
      "glu_backward",
      [](const Matrix& dy, const Matrix& gate, const Matrix& up, const MutableMatrix* dgate,
         const MutableMatrix* dup, int activation, int threads) {
        kernels().glu_backward(dy, gate, up, or_absent(dgate, dy), or_absent(dup, dy),
                               static_cast<Activation>(activation), threads);
      },
      release());
  m.def(
      "bias_activation_forward",
      [](const Matrix& x, uintptr_t bias, const MutableMatrix& y, int activation, int threads) {
        kernels().bias_activation_forward(x, pointer<const float>(bias), y,
                                          static_cast<Activation>(activation), threads);
      },
      release());
  m.def(
      "bias_activation_backward",
      [](const Matrix& dy, const Matrix& x, uintptr_t bias, const MutableMatrix& dx, int activation,
         int threads) {
        kernels().bias_activation_backward(dy, x, pointer<const float>(bias), dx,
                                           static_cast<Activation>(activation), threads);
      },
      release());
  m.def(
      "column_sum",
      [](const Matrix& x, uintptr_t partial, uintptr_t out, int threads) {
        kernels().column_sum(x, pointer<float>(partial), pointer<float>(out), threads);
      },
      release());
  m.def(
      "attention_forward",
      [](const AttentionShape& shape, const Heads& q, const Heads& k, const Heads& v,
         const AttentionMask& mask, const MutableHeads& out, uintptr_t row_maximum,
         uintptr_t row_sum, uintptr_t scratch, int threads) {
        kernels().attention_forward({shape, q, k, v, mask}, out, pointer<float>(row_maximum),
                                    pointer<float>(row_sum), pointer<float>(scratch), threads);
      },
      release());
  m.def(
      "attention_backward",
      [](const AttentionShape& shape, const Heads& q, const Heads& k, const Heads& v,
         const AttentionMask& mask, const Heads& out, const Heads& dout, uintptr_t row_maximum,
         uintptr_t row_sum, const MutableHeads& dq, const MutableHeads& dk, const MutableHeads& dv,
         uintptr_t scratch, int threads) {
        kernels().attention_backward(
            {shape, q, k, v, mask},
            {out, dout, pointer<const float>(row_maximum), pointer<const float>(row_sum)},
            {dq, dk, dv}, pointer<float>(scratch), threads);
      },
      release());
  m.def(
      "rope",
      [](const std::vector<RopeOperand>& operands, const RopeTables& tables, int64_t batch,
         int64_t positions, int64_t features, int64_t rotary, bool interleaved, bool transposed,
         int threads) {
        const RopeShape shape{batch, positions, features, rotary, interleaved, transposed};
        kernels().rope(operands.data(), static_cast<int64_t>(operands.size()), tables, shape,
                       threads);
      },
      release());
  m.def(
      "rms_norm_forward",
      [](const Matrix& x, const Matrix* residual, const MutableMatrix* sum,
         const NormVector& weight, double eps, bool round_first, const MutableMatrix& y,
         uintptr_t rstd, int threads) {
        kernels().rms_norm_forward(x, residual, sum, weight, eps, round_first, y,
                                   pointer<float>(rstd), threads);
      },
      release());
  m.def(
      "rms_norm_backward",
      [](const Matrix& dy, const Matrix& x, const NormVector& weight, uintptr_t rstd,
         const Matrix* addend, const MutableMatrix* dx, const ColumnSums& dweight, int threads) {
        kernels().rms_norm_backward(dy, x, weight, pointer<const float>(rstd), addend, dx, dweight,
                                    threads);
      },
      release());
  m.def(
      "layer_norm_forward",
      [](const Matrix& x, const Matrix* residual, const MutableMatrix* sum,
         const NormVector& weight, const NormVector& bias, double eps, const MutableMatrix& y,
         uintptr_t mean, uintptr_t rstd, int threads) {
        kernels().layer_norm_forward(x, residual, sum, weight, bias, eps, y, pointer<float>(mean),
                                     pointer<float>(rstd), threads);
      },
      release());
  m.attr("adamw_block") = kAdamWBlock;
  m.attr("adamw_quantised") = kQuantised;
  m.attr("adamw_address_columns") = sizeof(AdamWAddresses) / sizeof(int64_t);
  m.attr("adamw_fact_columns") = sizeof(AdamWFacts) / sizeof(double);
  m.def(
      "sums_of_squares",
      [](uintptr_t tensors, int64_t count, int dtype, uintptr_t out, int threads) {
        kernels().sums_of_squares(pointer<const AdamWAddresses>(tensors), count,
                                  static_cast<DType>(dtype), pointer<double>(out), threads);
      },
      release());
  m.def(
      "adamw_step",
      [](uintptr_t tensors, uintptr_t facts, int64_t count, int param_dtype, int grad_dtype,
         int moments, int rounding, float grad_factor, uint64_t seed, uintptr_t norms,
         int threads) {
        const AdamWCall call{static_cast<DType>(param_dtype),
                             static_cast<DType>(grad_dtype),
                             static_cast<Moments>(moments),
                             static_cast<Rounding>(rounding),
                             grad_factor,
                             seed};
        kernels().adamw_step(pointer<const AdamWAddresses>(tensors),
                             pointer<const AdamWFacts>(facts), count, call, pointer<double>(norms),
                             threads);
      },
      release());
  m.def(
      "limit_norms",
      [](uintptr_t tensors, uintptr_t norms, int64_t count, int dtype, int rounding, int threads) {
        kernels().limit_norms(pointer<const AdamWLimit>(tensors), pointer<const float>(norms),
                              count, static_cast<DType>(dtype), static_cast<Rounding>(rounding),
                              threads);
      },
      release());
  m.def(
      "layer_norm_backward",
      [](const Matrix& dy, const Matrix& x, const NormVector& weight, uintptr_t mean,
         uintptr_t rstd, const Matrix* addend, const MutableMatrix* dx, const ColumnSums& dweight,
         const ColumnSums& dbias, int threads) {
        kernels().layer_norm_backward(dy, x, weight, pointer<const float>(mean),
                                      pointer<const float>(rstd), addend, dx, dweight, dbias,
                                      threads);
      },
      release());
}

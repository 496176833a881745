// Batches with several adapters in fasttune._cpu.
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bind_cpu.h"
#include "cpu/lora_runs.h"
#include "tensors.h"

namespace fasttune::cpu {
namespace {

namespace py = pybind11;

using Runs = std::vector<std::tuple<int64_t, int64_t, size_t>>;  // first, end, branch

std::vector<float*> addresses(const std::vector<Flat>& tensors) {
  std::vector<float*> found;
  for (const Flat& tensor : tensors) found.push_back(static_cast<float*>(tensor.data));
  return found;
}

// Gradients of the factors [R, K] or [N, R], or nothing.
std::vector<MutableMatrix> gradients(const std::vector<Flat>& tensors,
                                     const std::vector<Matrix>& factors) {
  std::vector<MutableMatrix> found;
  for (size_t j = 0; j < factors.size(); ++j)
    found.push_back(
        {tensors[j].data, factors[j].rows, factors[j].cols, factors[j].cols, tensors[j].dtype});
  return found;
}

std::optional<RunsWeight> weight_of(const Matrix* w, bool transposed) {
  return w ? std::optional<RunsWeight>({*w, transposed}) : std::nullopt;
}

template <typename T>
T* or_null(std::optional<T>& value) {
  return value ? &*value : nullptr;
}

RunsCall call_of(const Runs& runs, const std::vector<Matrix>& a, const std::vector<Matrix>& b,
                 const std::vector<Flat>& biases, const std::vector<float>& scales,
                 const std::vector<Dropout>& dropouts, int threads) {
  RunsCall call{{}, {}, threads};
  for (size_t j = 0; j < a.size(); ++j)
    call.branches.push_back({a[j], b.at(j), static_cast<const float*>(biases.at(j).data),
                             scales.at(j), dropouts.at(j)});
  for (const auto& [first, end, branch] : runs) call.runs.push_back({first, end, branch});
  return call;
}

}  // namespace

void bind_lora_runs(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "runs_forward",
      [](const Matrix& x, const Matrix* w, bool transposed, const Matrix* addend, const Runs& runs,
         const std::vector<Matrix>& a, const std::vector<Matrix>& b,
         const std::vector<Flat>& biases, const std::vector<float>& scales,
         const std::vector<Dropout>& dropouts, const std::vector<Flat>& ts, const MutableMatrix& y,
         int threads) {
        auto weight = weight_of(w, transposed);
        runs_forward(call_of(runs, a, b, biases, scales, dropouts, threads), x, or_null(weight),
                     addend, addresses(ts), y);
      },
      release());
  m.def(
      "runs_backward",
      [](const Matrix& dy, const Matrix* w, bool transposed, const Matrix* addend, const Matrix* x,
         const Runs& runs, const std::vector<Matrix>& a, const std::vector<Matrix>& b,
         const std::vector<Flat>& ts, const std::vector<float>& scales,
         const std::vector<Dropout>& dropouts, const MutableMatrix* dx,
         const std::vector<Flat>& das, const std::vector<Flat>& dbs, int threads) {
        auto weight = weight_of(w, transposed);
        const std::vector<Flat> none(a.size());
        runs_backward(call_of(runs, a, b, none, scales, dropouts, threads), dy, x, or_null(weight),
                      addend, addresses(ts), dx, gradients(das, a), gradients(dbs, b));
      },
      release());
}

}  // namespace fasttune::cpu

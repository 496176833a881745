// Batches with several adapters in fasttune._cpu.
#include <pybind11/stl.h>

#include <optional>
#include <string>
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

// The call, once its runs and shapes fit rows [M, K] or of a gradient: inputs and outputs are K, N.
RunsCall call_of(const Runs& runs, const std::vector<Matrix>& a, const std::vector<Matrix>& b,
                 const std::vector<Flat>& biases, const std::vector<float>& scales,
                 const std::vector<Dropout>& dropouts, const std::vector<Flat>& ts, int64_t rows,
                 int64_t inputs, int64_t outputs, int threads) {
  RunsCall call{{}, {}, threads};
  const size_t count = a.size();
  expect(b.size() == count && biases.size() == count && scales.size() == count &&
             dropouts.size() == count && ts.size() == runs.size(),
         "branches");
  for (size_t j = 0; j < count; ++j) {
    expect(a[j].cols == inputs && a[j].rows > 0 && a[j].rows <= kMaxRank, "a");
    expect(has_shape(b[j], outputs, a[j].rows), "b");
    expect(has_size(biases[j], outputs), "bias");
    call.branches.push_back(
        {a[j], b[j], static_cast<const float*>(biases[j].data), scales[j], dropouts[j]});
  }
  int64_t last = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    const auto& [first, end, branch] = runs[i];
    if (first < last || end < first || end > rows || branch >= count)
      throw py::value_error("runs: expected rows that ascend below " + std::to_string(rows) +
                            " and branches below " + std::to_string(count));
    expect(has_size(ts[i], (end - first) * a[branch].rows), "t");
    call.runs.push_back({first, end, branch});
    last = end;
  }
  return call;
}

void expect_gradients(const std::vector<Flat>& gradients, const std::vector<Matrix>& factors) {
  expect(gradients.size() == factors.size(), "gradients");
  for (size_t j = 0; j < factors.size(); ++j)
    expect(has_size(gradients[j], factors[j].rows * factors[j].cols), "gradient");
}

void expect_weight(const Matrix* w, bool transposed, int64_t depth, int64_t cols) {
  expect(transposed ? has_shape(w, cols, depth) : has_shape(w, depth, cols), "weight");
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
        const RunsCall call =
            call_of(runs, a, b, biases, scales, dropouts, ts, x.rows, x.cols, y.cols, threads);
        expect_weight(w, transposed, x.cols, y.cols);
        expect(has_shape(addend, x.rows, y.cols) && y.rows == x.rows, "addend, y");
        auto weight = weight_of(w, transposed);
        runs_forward(call, x, or_null(weight), addend, addresses(ts), y);
      },
      release());
  m.def(
      "runs_backward",
      [](const Matrix& dy, const Matrix* w, bool transposed, const Matrix* addend, const Matrix* x,
         const Runs& runs, const std::vector<Matrix>& a, const std::vector<Matrix>& b,
         const std::vector<Flat>& ts, const std::vector<float>& scales,
         const std::vector<Dropout>& dropouts, const MutableMatrix* dx,
         const std::vector<Flat>& das, const std::vector<Flat>& dbs, int threads) {
        const int64_t inputs = a.empty() ? 0 : a[0].cols;
        const RunsCall call = call_of(runs, a, b, std::vector<Flat>(a.size()), scales, dropouts, ts,
                                      dy.rows, inputs, dy.cols, threads);
        expect_weight(w, transposed, dy.cols, inputs);
        expect(has_shape(addend, dy.rows, inputs) && has_shape(dx, dy.rows, inputs), "addend, dx");
        expect(has_shape(x, dy.rows, inputs), "x");
        expect_gradients(das, a);
        expect_gradients(dbs, b);
        for (size_t j = 0; j < a.size(); ++j) expect(das[j].data == nullptr || x != nullptr, "x");
        for (size_t i = 0; i < ts.size(); ++i)
          expect(ts[i].data != nullptr || dbs[call.runs[i].branch].data == nullptr ||
                     call.runs[i].first == call.runs[i].end,
                 "t");
        auto weight = weight_of(w, transposed);
        runs_backward(call, dy, x, or_null(weight), addend, addresses(ts), dx, gradients(das, a),
                      gradients(dbs, b));
      },
      release());
}

}  // namespace fasttune::cpu

// Bottleneck adapters in fasttune._cpu. Their operands come as tensors, whose shapes are compared
// here.
#include "bind_cpu.h"
#include "cpu/isa.h"
#include "tensors.h"

namespace fasttune::cpu {
namespace {

namespace py = pybind11;

}  // namespace

void bind_bottleneck(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "bottleneck_forward",
      [](const Matrix& x, const Matrix& down, const Matrix& up, const Flat& down_bias,
         int activation, float factor, const Dropout& dropout, const Matrix* residual,
         const Flat& up_bias, const Flat& scale, const MutableMatrix& z, const MutableMatrix& y,
         int threads) {
        const int64_t rows = x.rows, rank = down.rows, outputs = up.rows;
        expect(down.cols == x.cols, "down");
        expect(up.cols == rank, "up");
        expect(has_size(down_bias, rank), "down_bias");
        expect(has_size(up_bias, outputs), "up_bias");
        expect(has_size(scale, outputs), "scale");
        expect(has_shape(residual, rows, outputs), "residual");
        expect(has_shape(z, rows, rank) && has_shape(y, rows, outputs), "z, y");
        const auto vector = [](const Flat& given, int64_t size) {
          return Matrix{given.data, 1, size, size, given.dtype};
        };
        const auto given = [](const Matrix& vector) { return vector.data ? &vector : nullptr; };
        const Matrix inner = vector(down_bias, down.rows), outer = vector(up_bias, up.rows);
        const Matrix columns = vector(scale, up.rows);
        return kernels().bottleneck_forward(
            {x, down, up, given(inner), activation, factor, dropout}, residual, given(outer),
            given(columns), z, y, threads);
      },
      release());
  m.def(
      "bottleneck_backward",
      [](const Matrix& x, const Matrix& down, const Matrix& up, int activation, float factor,
         const Dropout& dropout, const Matrix& dy, const Matrix& z, const Matrix* addend,
         float outer_factor, const MutableMatrix* dx, const MutableMatrix* ddown,
         const Flat& ddown_bias, const MutableMatrix* dup, const Flat& dup_bias, int threads) {
        const int64_t rows = x.rows, rank = down.rows, outputs = up.rows;
        expect(down.cols == x.cols && has_shape(ddown, rank, x.cols), "down");
        expect(up.cols == rank && has_shape(dup, outputs, rank), "up");
        expect(has_size(ddown_bias, rank), "down_bias");
        expect(has_size(dup_bias, outputs), "up_bias");
        expect(has_shape(dy, rows, outputs) && has_shape(z, rows, rank), "dy, z");
        expect(has_shape(addend, rows, x.cols) && has_shape(dx, rows, x.cols), "dx");
        const auto vector = [](const Flat& given, int64_t size) {
          return MutableMatrix{given.data, 1, size, size, given.dtype};
        };
        const auto wanted = [](const MutableMatrix& out) { return out.data ? &out : nullptr; };
        const MutableMatrix own_down_bias = vector(ddown_bias, down.rows),
                            own_up_bias = vector(dup_bias, up.rows);
        return kernels().bottleneck_backward(
            {x, down, up, nullptr, activation, factor, dropout}, dy, z, addend, outer_factor,
            {dx, ddown, wanted(own_down_bias), dup, wanted(own_up_bias)}, threads);
      },
      release());
}

}  // namespace fasttune::cpu

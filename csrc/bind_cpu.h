// The parts of the extension module fasttune._cpu that have files of their own, and how they
// compare shapes.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "tensors.h"

namespace fasttune::cpu {

void bind_bottleneck(pybind11::module_& m);
void bind_lora_runs(pybind11::module_& m);

inline void expect(bool fits, const char* name) {
  if (!fits)
    throw pybind11::value_error(std::string(name) + ": its shape does not fit that of the others");
}
inline bool has_shape(const Matrix& m, int64_t rows, int64_t cols) {
  return m.rows == rows && m.cols == cols;
}
inline bool has_shape(const MutableMatrix& m, int64_t rows, int64_t cols) {
  return m.rows == rows && m.cols == cols;
}
// What is missing fits.
template <typename M>
bool has_shape(const M* m, int64_t rows, int64_t cols) {
  return m == nullptr || has_shape(*m, rows, cols);
}
inline bool has_size(const Flat& v, int64_t size) { return v.data == nullptr || v.count == size; }

}  // namespace fasttune::cpu

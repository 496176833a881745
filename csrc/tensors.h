// torch's tensors as arguments of the extension module, without linking torch: DLPack's C exchange
// API (version 1.3; torch.Tensor.__dlpack_c_exchange_api__) reads one in a few nanoseconds, where
// asking it from Python for its address, shape, strides and dtype took a microsecond.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/kernels.h"

namespace fasttune {

// The structures of dlpack.h, as far as they are read here.
struct DlpackTensor {
  void* data;
  int32_t device_type, device_id, dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DlpackExchange {
  uint32_t major, minor;
  const DlpackExchange* previous;  // the API of an older version
  void *allocate, *managed_from_object, *managed_to_object;
  int (*read)(void* object, DlpackTensor* out);  // nothing is owned; -1 and an exception set
  void* stream;
};

// A contiguous vector or output of any shape, or nothing: its address, 0 for none, and its dtype.
struct Flat {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t count = 0;
};

// What the tensors of this process are read with; set once, before any kernel is called.
class Tensors {
 public:
  static void use(pybind11::capsule exchange, pybind11::type tensor, pybind11::type parameter) {
    const auto* newest = exchange.get_pointer<const DlpackExchange>();
    const DlpackExchange* found = newest;
    while (found && found->major != 1) found = found->previous;
    if (!found || !found->read)
      throw pybind11::import_error("torch's tensors are exchanged by DLPack " +
                                   std::to_string(newest->major) + ", and fasttune knows DLPack 1");
    exchange_ = found;
    tensor_ = tensor.release().ptr();  // kept for good, as modules are
    parameter_ = parameter.release().ptr();
    is_neg_ = PyUnicode_InternFromString("is_neg");
  }

  static bool is_tensor(PyObject* object) {
    if (exchange_ == nullptr) return false;
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == tensor_ || type == parameter_ || PyObject_IsInstance(object, tensor_) == 1;
  }

  static DlpackTensor read(PyObject* object, DType* dtype) {
    DlpackTensor found;
    if (exchange_->read(object, &found) != 0) throw pybind11::error_already_set();
    if (found.data == nullptr && elements(found) > 0)
      throw pybind11::value_error("expected a tensor with its values in memory");
    found.data = static_cast<char*>(found.data) + found.byte_offset;
    if (found.device_type != kCpu)
      throw pybind11::value_error("expected a tensor on the CPU, got DLPack's device type " +
                                  std::to_string(found.device_type));
    *dtype = dtype_of(found);
    // What torch would negate as it reads, which DLPack does not show and no kernel does.
    const auto negative = pybind11::reinterpret_steal<pybind11::object>(
        PyObject_VectorcallMethod(is_neg_, &object, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
    if (!negative) throw pybind11::error_already_set();
    if (negative.ptr() != Py_False)
      throw pybind11::value_error("expected a tensor without the negative bit");
    return found;
  }

  static int64_t elements(const DlpackTensor& x) {
    int64_t count = 1;
    for (int32_t i = 0; i < x.dimensions; ++i) count *= x.shape[i];
    return count;
  }

 private:
  static constexpr int32_t kCpu = 1;

  static DType dtype_of(const DlpackTensor& x) {
    constexpr uint8_t kFloat = 2, kBfloat = 4;
    if (x.lanes == 1 && x.code == kFloat && x.bits == 32) return DType::kFloat32;
    if (x.lanes == 1 && x.code == kBfloat && x.bits == 16) return DType::kBFloat16;
    if (x.lanes == 1 && x.code == kFloat && x.bits == 16) return DType::kFloat16;
    throw pybind11::type_error("expected a tensor of fp32, bf16 or fp16, got DLPack's type code " +
                               std::to_string(x.code) + " of " + std::to_string(x.bits) + " bits");
  }

  inline static const DlpackExchange* exchange_ = nullptr;
  inline static PyObject *tensor_ = nullptr, *parameter_ = nullptr, *is_neg_ = nullptr;
};

}  // namespace fasttune

namespace pybind11::detail {

// A matrix is a tensor [rows, cols] with unit column stride; a pointer to one may be None.
template <typename T>
class matrix_caster {
 public:
  static constexpr auto name = const_name("torch.Tensor");
  template <typename U>
  using cast_op_type = pybind11::detail::cast_op_type<U>;

  operator T*() { return given_ ? &matrix_ : nullptr; }
  operator T&() {
    if (!given_) throw reference_cast_error();
    return matrix_;
  }

  bool load(handle source, bool) {
    given_ = !source.is_none();
    if (!given_) return true;
    if (!fasttune::Tensors::is_tensor(source.ptr())) return false;
    fasttune::DType dtype;
    const auto x = fasttune::Tensors::read(source.ptr(), &dtype);
    if (x.dimensions != 2 || (x.strides[1] != 1 && x.shape[1] > 1 && x.shape[0] > 0))
      throw value_error("expected a matrix with unit column stride, got " + described(x));
    matrix_ = {x.data, x.shape[0], x.shape[1], x.strides[0], dtype};
    return true;
  }

 private:
  static std::string described(const fasttune::DlpackTensor& x) {
    std::string shape, strides;
    for (int32_t i = 0; i < x.dimensions; ++i) {
      shape += (i ? ", " : "") + std::to_string(x.shape[i]);
      strides += (i ? ", " : "") + std::to_string(x.strides[i]);
    }
    return "[" + shape + "] with strides [" + strides + "]";
  }

  T matrix_{};
  bool given_ = false;
};

template <>
class type_caster<fasttune::cpu::Matrix> : public matrix_caster<fasttune::cpu::Matrix> {};
template <>
class type_caster<fasttune::cpu::MutableMatrix>
    : public matrix_caster<fasttune::cpu::MutableMatrix> {};

template <>
struct type_caster<fasttune::Flat> {
  PYBIND11_TYPE_CASTER(fasttune::Flat, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    value = {};
    if (source.is_none()) return true;
    if (!fasttune::Tensors::is_tensor(source.ptr())) return false;
    const auto x = fasttune::Tensors::read(source.ptr(), &value.dtype);
    int64_t expected = 1;
    for (int32_t i = x.dimensions - 1; i >= 0; --i) {
      if (x.shape[i] > 1 && x.strides[i] != expected)
        throw value_error("expected a contiguous tensor");
      expected *= x.shape[i];
    }
    value.data = x.data;
    value.count = expected;
    return true;
  }
};

}  // namespace pybind11::detail

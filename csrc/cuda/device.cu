#include "cuda/primitives.cuh"

namespace fasttune::cuda {

std::string why_no_device() { return device_error(); }

}  // namespace fasttune::cuda

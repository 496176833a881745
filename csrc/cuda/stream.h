// The stream of a launch and the state of the device, for code that only a C++ compiler sees.
#pragma once

#include <string>

struct CUstream_st;  // what CUDA's cudaStream_t points to

namespace fasttune::cuda {

using Stream = CUstream_st*;

// Why no kernel can be launched, in the words of the CUDA runtime; empty if one can.
std::string why_no_device();

}  // namespace fasttune::cuda

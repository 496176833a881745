// Element types that cross the Python border as integer codes. Shared by CPU and CUDA code.
#pragma once

#include <cstdint>

namespace fasttune {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace fasttune

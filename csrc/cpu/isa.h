// Run-time choice between the builds of the kernels for AMX, AVX-512 (with bf16 or without), AVX2
// and plain C++.
#pragma once

#include <string>

#include "kernels.h"

namespace fasttune::cpu {

// The table in use. The first call picks the widest build that the CPU runs; FASTTUNE_CPU_ISA
// (amx, avx512bf16, avx512, avx2, plain) forces one and throws std::runtime_error if it cannot run
// here.
const Kernels& kernels();

// Name of the build in use, and all that this CPU can run, widest first, separated by commas.
std::string isa_name();
std::string isa_available();
// Switches the build for the whole process (tests); throws std::runtime_error if it cannot run
// here.
void set_isa(const std::string& name);

// True where bf16 matrix products of the vendor library (vdpbf16ps) are faster than fp32 ones
// without AMX: AMD's Zen 4 and later do twice the multiply-adds a cycle, Intel's AVX-512 the same
// number.
bool has_fast_bf16_dot();

}  // namespace fasttune::cpu

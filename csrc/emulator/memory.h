// What kernels may touch, and who touched shared memory last.
#pragma once

#include <cstddef>

namespace emulator {

enum class Access { kRead, kWrite, kAtomic };

// Judges one access of the running kernel: where it lands, and for shared memory its history.
void touch(const void* address, size_t bytes, Access access, const void* program_counter);

}  // namespace emulator

// What g++ calls in code that it compiles with -fsanitize=thread and -fsanitize=undefined. The
// sanitizers' own libraries are not linked: every load, store and check of a kernel comes here.
#include <cstdint>
#include <string>

#include "memory.h"
#include "runtime.h"

using emulator::Access;
using emulator::touch;

#define ACCESS(name, bytes)                                             \
  extern "C" void __tsan_read##name(void* address) {                    \
    touch(address, bytes, Access::kRead, __builtin_return_address(0));  \
  }                                                                     \
  extern "C" void __tsan_write##name(void* address) {                   \
    touch(address, bytes, Access::kWrite, __builtin_return_address(0)); \
  }                                                                     \
  extern "C" void __tsan_unaligned_read##name(void* address) {          \
    touch(address, bytes, Access::kRead, __builtin_return_address(0));  \
  }                                                                     \
  extern "C" void __tsan_unaligned_write##name(void* address) {         \
    touch(address, bytes, Access::kWrite, __builtin_return_address(0)); \
  }

ACCESS(1, 1)
ACCESS(2, 2)
ACCESS(4, 4)
ACCESS(8, 8)
ACCESS(16, 16)

extern "C" void __tsan_read_range(void* address, size_t bytes) {
  touch(address, bytes, Access::kRead, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, size_t bytes) {
  touch(address, bytes, Access::kWrite, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void*, void*) {}

namespace {

// The head of every record that g++ passes to a check of undefined behaviour.
struct Place {
  const char* file;
  uint32_t line, column;
};

void undefined(const char* what, const void* record) {
  const Place& place = *static_cast<const Place*>(record);
  emulator::fail(std::string(what) + " at " + place.file + ":" + std::to_string(place.line));
}

}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1(void* record, uintptr_t) {
  undefined("misaligned access", record);
}
extern "C" void __ubsan_handle_out_of_bounds(void* record, uintptr_t index) {
  undefined(("out-of-bounds index " + std::to_string(index)).c_str(), record);
}
extern "C" void __ubsan_handle_shift_out_of_bounds(void* record, uintptr_t, uintptr_t) {
  undefined("undefined shift", record);
}
extern "C" void __ubsan_handle_divrem_overflow(void* record, uintptr_t, uintptr_t) {
  undefined("division by zero or overflow", record);
}
extern "C" void __ubsan_handle_add_overflow(void* record, uintptr_t, uintptr_t) {
  undefined("signed overflow", record);
}
extern "C" void __ubsan_handle_sub_overflow(void* record, uintptr_t, uintptr_t) {
  undefined("signed overflow", record);
}
extern "C" void __ubsan_handle_mul_overflow(void* record, uintptr_t, uintptr_t) {
  undefined("signed overflow", record);
}
extern "C" void __ubsan_handle_negate_overflow(void* record, uintptr_t) {
  undefined("signed overflow", record);
}

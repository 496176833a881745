#include "memory.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <unordered_map>

#include "runtime.h"

namespace emulator {
namespace {

struct Range {
  const char* begin = nullptr;
  size_t bytes = 0;
  bool holds(const void* address, size_t count) const {
    const char* first = static_cast<const char*>(address);
    return first >= begin && first + count <= begin + bytes;
  }
};

// One access to one byte of shared memory.
struct Stamp {
  int thread = -1;
  unsigned epoch = 0, clock = 0;
  bool atomic = false;
};

// Two readers suffice: a later writer is another thread than at least one of them.
struct Cell {
  Stamp writer, readers[2];
  bool in_flight = false;  // a cp.async is to land here
};

// The dynamic linker makes the segment of a thread when something in it is first touched.
thread_local volatile char shared_anchor;

constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point type

Range static_shared, module_data[16], arguments;
int module_parts = 0;
std::vector<uint4> dynamic_memory;
size_t dynamic_bytes = 0;
std::unordered_map<const char*, Cell> cells;
std::map<const char*, size_t> buffers;  // global memory by address

int find_module(dl_phdr_info* info, size_t, void*) {
  const char* self = reinterpret_cast<const char*>(&module_parts);
  bool found = false;
  Range parts[16];
  int count = 0;
  size_t shared_bytes = 0;
  for (int i = 0; i < info->dlpi_phnum && count < 16; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type == PT_TLS) shared_bytes = header.p_memsz;
    if (header.p_type != PT_LOAD) continue;
    parts[count] = {reinterpret_cast<const char*>(info->dlpi_addr + header.p_vaddr),
                    header.p_memsz};
    found |= parts[count++].holds(self, 1);
  }
  if (!found) return 0;
  std::copy(parts, parts + count, module_data);
  module_parts = count;
  static_shared = {static_cast<const char*>(info->dlpi_tls_data), shared_bytes};
  return 1;
}

Range dynamic_range() {
  return {reinterpret_cast<const char*>(dynamic_memory.data()), dynamic_bytes};
}

bool is_shared(const void* address, size_t bytes) {
  return static_shared.holds(address, bytes) || dynamic_range().holds(address, bytes);
}

std::string shared_name(const char* address) {
  if (dynamic_range().holds(address, 1))
    return "dynamic shared memory + " + std::to_string(address - dynamic_range().begin);
  return "static shared memory + " + std::to_string(address - static_shared.begin);
}

// Whoever loaded the library turns the offset into a source line.
std::string place_of(const void* program_counter) {
  Dl_info info;
  if (!dladdr(program_counter, &info)) return "";
  char offset[32];
  std::snprintf(offset, sizeof offset, " at {0x%zx}",
                static_cast<size_t>(static_cast<const char*>(program_counter) -
                                    static_cast<const char*>(info.dli_fbase) - 1));
  return offset;
}

// Whether `before` may happen at the same time as what the current thread does now.
bool concurrent(const Stamp& before) {
  const int self = static_cast<int>(current->linear);
  if (before.thread < 0 || before.thread == self || before.epoch != block.epoch) return false;
  return before.thread / 32 != self / 32 || current->clock[before.thread % 32] < before.clock;
}

Stamp now(bool atomic) {
  return {static_cast<int>(current->linear), block.epoch, current->clock[here.lane], atomic};
}

void report_race(const char* kind, const Stamp& other, const char* address,
                 const void* program_counter) {
  fail(std::string("race: ") + kind + " at " + shared_name(address) + ", with thread " +
       std::to_string(other.thread) + place_of(program_counter));
}

void read_byte(const char* address, Cell& cell, const void* pc) {
  if (cell.in_flight)
    fail("read of " + shared_name(address) + " before its cp.async was waited for" + place_of(pc));
  if (cell.writer.thread < 0)
    fail("read of " + shared_name(address) + ", which this block has not written" + place_of(pc));
  if (concurrent(cell.writer)) report_race("read after write", cell.writer, address, pc);
  Stamp& slot =
      cell.readers[0].thread == static_cast<int>(current->linear) || !concurrent(cell.readers[0])
          ? cell.readers[0]
          : cell.readers[1];
  slot = now(false);
}

void write_byte(const char* address, Cell& cell, bool atomic, const void* pc) {
  if (cell.in_flight)
    fail("write to " + shared_name(address) + " before its cp.async was waited for" + place_of(pc));
  if (concurrent(cell.writer) && !(atomic && cell.writer.atomic))
    report_race("write after write", cell.writer, address, pc);
  for (const Stamp& reader : cell.readers)
    if (concurrent(reader)) report_race("write after read", reader, address, pc);
  cell.writer = now(atomic);
}

void touch_shared(const char* address, size_t bytes, Access access, const void* pc) {
  for (const char* byte = address; byte < address + bytes; ++byte) {
    Cell& cell = cells[byte];
    if (access == Access::kRead)
      read_byte(byte, cell, pc);
    else
      write_byte(byte, cell, access == Access::kAtomic, pc);
  }
}

bool in_a_buffer(const char* address, size_t bytes) {
  auto after = buffers.upper_bound(address);
  if (after == buffers.begin()) return false;
  --after;
  return Range{after->first, after->second}.holds(address, bytes);
}

bool in_the_module(const void* address, size_t bytes) {
  for (int i = 0; i < module_parts; ++i)
    if (module_data[i].holds(address, bytes)) return true;
  return false;
}

std::string nearest_buffer(const char* address) {
  auto after = buffers.upper_bound(address);
  if (after == buffers.begin()) return "before every buffer";
  --after;
  return std::to_string(address - after->first) + " bytes into a buffer of " +
         std::to_string(after->second);
}

}  // namespace

void touch(const void* pointer, size_t bytes, Access access, const void* program_counter) {
  if (!current || !error.empty()) return;
  const char* address = static_cast<const char*>(pointer);
  if (on_own_stack(address)) return;
  if (is_shared(address, bytes)) return touch_shared(address, bytes, access, program_counter);
  if (arguments.holds(address, bytes) || in_the_module(address, bytes)) return;
  if (in_a_buffer(address, bytes)) return;
  const char* kind = access == Access::kRead ? "read" : "write";
  fail(std::string("out-of-bounds ") + kind + " of " + std::to_string(bytes) + " bytes, " +
       nearest_buffer(address) + place_of(program_counter));
}

void reset_shared(size_t bytes) {
  shared_anchor = 0;
  if (!module_parts) dl_iterate_phdr(find_module, nullptr);
  std::memset(const_cast<char*>(static_shared.begin), kPoison, static_shared.bytes);
  dynamic_memory.assign((bytes + sizeof(uint4) - 1) / sizeof(uint4), uint4{~0u, ~0u, ~0u, ~0u});
  dynamic_bytes = bytes;
  cells.clear();
}

void set_arguments(const void* memory, size_t bytes) {
  arguments = {static_cast<const char*>(memory), bytes};
}

void* dynamic_shared() { return dynamic_memory.data(); }

void note_atomic(void* address, size_t bytes) {
  touch(address, bytes, Access::kAtomic, __builtin_return_address(0));
}

void read_shared(const void* from, void* to, size_t bytes) {
  if (!is_shared(from, bytes)) fail("ldmatrix reads outside shared memory");
  if (reinterpret_cast<uintptr_t>(from) % bytes) fail("misaligned address of ldmatrix");
  touch(from, bytes, Access::kRead, __builtin_return_address(0));
  std::memcpy(to, from, bytes);
}

void copy_async(void* shared, const void* global, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    fail("misaligned address of cp.async");
  if (!is_shared(shared, bytes)) fail("cp.async writes outside shared memory");
  touch(global, bytes, Access::kRead, __builtin_return_address(0));
  touch(shared, bytes, Access::kWrite, __builtin_return_address(0));
  std::memset(shared, kPoison, bytes);
  for (size_t i = 0; i < bytes; ++i) cells[static_cast<char*>(shared) + i].in_flight = true;
  current->issued.push_back({shared, global, bytes});
}

void copy_async_commit() {
  current->committed.push_back(std::move(current->issued));
  current->issued.clear();
}

// The data land here and not earlier, so that a missing or too weak wait shows.
void copy_async_wait(unsigned groups_left) {
  while (current->committed.size() > groups_left) {
    for (const Copy& copy : current->committed.front()) {
      std::memcpy(copy.shared, copy.global, copy.bytes);
      for (size_t i = 0; i < copy.bytes; ++i) {
        Cell& cell = cells[static_cast<char*>(copy.shared) + i];
        cell.in_flight = false;
        cell.writer = now(false);
      }
    }
    current->committed.pop_front();
  }
}

}  // namespace emulator

// The tests name the global memory that a kernel may touch.
extern "C" void emulator_add_buffer(const void* address, size_t bytes) {
  emulator::buffers[static_cast<const char*>(address)] = bytes;
}

extern "C" void emulator_forget_buffers() { emulator::buffers.clear(); }

#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace fasttune::cpu {
namespace {

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> tables;
#if defined(FASTTUNE_X86_BUILDS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
    if (has_fast_bf16_dot()) tables.push_back(&avx512bf16::table());
    tables.push_back(&avx512::table());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    tables.push_back(&avx2::table());
#endif
  tables.push_back(&plain::table());
  return tables;
}

const Kernels* find(const std::string& name) {
  for (const Kernels* table : runnable())
    if (name == table->isa) return table;
  throw std::runtime_error("CPU kernels: expected one of " + isa_available() + ", got '" + name +
                           "'");
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = current.load(std::memory_order_acquire);
  if (!table) {
    const char* forced = std::getenv("FASTTUNE_CPU_ISA");
    table = forced && *forced ? find(forced) : runnable().front();
    current.store(table, std::memory_order_release);
  }
  return *table;
}

std::string isa_name() { return kernels().isa; }

std::string isa_available() {
  std::string names;
  for (const Kernels* table : runnable())
    names += (names.empty() ? "" : ",") + std::string(table->isa);
  return names;
}

bool has_fast_bf16_dot() {
#if defined(FASTTUNE_X86_BUILDS)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

void set_isa(const std::string& name) { current.store(find(name), std::memory_order_release); }

}  // namespace fasttune::cpu

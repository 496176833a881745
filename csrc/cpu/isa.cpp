#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#if defined(FASTTUNE_AMX_BUILD)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fasttune::cpu {
namespace {

#if defined(FASTTUNE_AMX_BUILD)
// The CPU has tiles for bf16, and the system lets this process use them: it must be asked, once.
bool has_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx & kBf16) || !(edx & kTiles) || !__builtin_cpu_supports("avx512bf16")) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}
#endif

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> tables;
#if defined(FASTTUNE_X86_BUILDS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
#if defined(FASTTUNE_AMX_BUILD)
    if (has_amx()) tables.push_back(&amx::table());
#endif
    if (has_fast_bf16_dot()) tables.push_back(&avx512bf16::table());
    tables.push_back(&avx512::table());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    tables.push_back(&avx2::table());
#endif
  tables.push_back(&plain::table());
#if defined(FASTTUNE_EMULATED_AMX_BUILD)  // never the first: for tests alone
  if (__builtin_cpu_supports("avx512bf16")) tables.push_back(&amxemulated::table());
#endif
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

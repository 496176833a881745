// What the parts of the runtime share; kernels do not see it.
#pragma once

#include <ucontext.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "cuda.h"

namespace emulator {

struct Copy {
  void* shared;
  const void* global;
  size_t bytes;
};

struct Thread {
  ucontext_t context;
  uint3 index;
  unsigned linear;
  const char* waits_at = nullptr;
  std::vector<Copy> issued;                 // cp.async since the last commit
  std::deque<std::vector<Copy>> committed;  // oldest first
  // When this thread last synchronised with each lane of its warp: a vector clock. Its own entry
  // counts its synchronisations.
  unsigned clock[32] = {};
};

struct Meeting {
  unsigned mask, arrived;
  const char* site;
  Exchanged data;
  std::vector<Thread*> waiting;
};

struct Block {
  std::vector<Thread> threads;
  std::deque<Thread*> ready;
  std::vector<Thread*> at_barrier;
  std::vector<std::vector<std::shared_ptr<Meeting>>> meetings;  // by warp
  std::vector<unsigned> live_lanes;                             // by warp, a mask
  unsigned alive = 0;
  unsigned epoch = 0;  // block barriers passed
};

extern Block block;
extern Thread* current;  // null outside kernels
extern std::string error;

// Records the first error and leaves the kernel; outside kernels it only records.
void fail(const std::string& message);
void wait_here();  // lets another thread run until somebody makes this one ready
bool on_own_stack(const void* address);
std::string position();  // "block (0,0,0) thread 5"

void reset_shared(size_t dynamic_bytes);
void set_arguments(const void* arguments, size_t bytes);

}  // namespace emulator

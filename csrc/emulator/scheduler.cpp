// Runs a grid: one block after another, a fiber per thread, in a random order by seed.
#include <sys/mman.h>

#include <algorithm>
#include <random>

#include "runtime.h"

namespace emulator {

Here here;
Block block;
Thread* current = nullptr;
std::string error;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kGuardBytes = 64 << 10;  // a whole page on every platform: overflow is a fault
constexpr unsigned kMaxThreads = 1024;

ucontext_t scheduler;
unsigned seed = 0;
std::mt19937 random_order;
std::vector<char*> stacks;  // by thread; reused by all blocks
void (*body)(const void*);
const void* body_arguments;

char* stack_of(unsigned linear) {
  while (stacks.size() <= linear) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(memory, kGuardBytes, PROT_NONE);
    stacks.push_back(static_cast<char*>(memory) + kGuardBytes);
  }
  return stacks[linear];
}

void release_barrier() {
  ++block.epoch;
  for (Thread* thread : block.at_barrier) block.ready.push_back(thread);
  block.at_barrier.clear();
}

void run_thread() {
  body(body_arguments);
  Thread* self = current;
  block.live_lanes[self->linear / 32] &= ~(1u << self->linear % 32);
  --block.alive;
  if (!block.at_barrier.empty())
    fail(std::string("divergent __syncthreads: a thread ended while others wait at ") +
         block.at_barrier.front()->waits_at);
  if (!self->issued.empty() || !self->committed.empty())
    fail("a thread ended with a cp.async that it did not wait for");
  setcontext(&scheduler);
}

void prepare_block(dim3 size, size_t shared_bytes) {
  const unsigned count = size.x * size.y * size.z;
  block = Block{};
  block.threads.resize(count);
  block.alive = count;
  block.meetings.resize((count + 31) / 32);
  block.live_lanes.assign((count + 31) / 32, ~0u);
  if (count % 32) block.live_lanes.back() = (1u << count % 32) - 1;
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.linear = i;
    thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    thread.clock[i % 32] = 1;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stack_of(i);
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
    block.ready.push_back(&thread);
  }
  reset_shared(shared_bytes);
}

std::string who_waits() {
  for (const Thread& thread : block.threads)
    if (thread.waits_at)
      return "thread " + std::to_string(thread.linear) + " at " + thread.waits_at;
  return "nobody";
}

void run_block() {
  while (block.alive && error.empty()) {
    if (block.ready.empty()) {
      fail("deadlock: no thread can go on; " + who_waits());
      return;
    }
    if (seed) std::swap(block.ready.front(), block.ready[random_order() % block.ready.size()]);
    Thread* next = block.ready.front();
    block.ready.pop_front();
    current = next;
    here.thread = next->index;
    here.lane = next->linear % 32;
    swapcontext(&scheduler, &next->context);
    current = nullptr;
  }
}

}  // namespace

std::string position() {
  const auto text = [](auto v) {
    return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
  };
  const std::string where = "block " + text(here.block);
  return current ? where + " thread " + std::to_string(current->linear) : where;
}

// The other fibers are dropped, not unwound: after an error what they own is leaked.
void fail(const std::string& message) {
  if (error.empty()) error = message + " [" + position() + "]";
  if (current) setcontext(&scheduler);
}

bool on_own_stack(const void* address) {
  const char* base = stacks[current->linear];
  return address >= base && address < base + kStackBytes;
}

void wait_here() { swapcontext(&current->context, &scheduler); }

void sync_block(const char* site) {
  if (block.alive < block.threads.size())
    fail(std::string("divergent __syncthreads: a thread has ended before ") + site);
  if (!block.at_barrier.empty() && std::string(block.at_barrier.front()->waits_at) != site)
    fail("divergent __syncthreads: thread " + std::to_string(block.at_barrier.front()->linear) +
         " waits at " + block.at_barrier.front()->waits_at + ", this one at " + site);
  Thread* self = current;
  self->waits_at = site;
  block.at_barrier.push_back(self);
  if (block.at_barrier.size() == block.alive) release_barrier();
  wait_here();
  self->waits_at = nullptr;
}

void launch(dim3 grid, dim3 size, size_t shared_bytes, void (*run)(const void*),
            const void* arguments, size_t argument_bytes) {
  if (!error.empty()) return;  // as in CUDA, an error stays until it is taken
  if (size.x * size.y * size.z == 0 || size.x * size.y * size.z > kMaxThreads)
    return fail("a block of " + std::to_string(size.x * size.y * size.z) + " threads");
  body = run;
  body_arguments = arguments;
  set_arguments(arguments, argument_bytes);
  here.block_size = size;
  here.grid_size = grid;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  if (seed) std::shuffle(order.begin(), order.end(), random_order);
  for (const uint64_t i : order) {
    if (!error.empty()) return;
    here.block = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / grid.x / grid.y)};
    prepare_block(size, shared_bytes);
    run_block();
  }
}

}  // namespace emulator

// Seed 0 runs threads and blocks in their order; forgets the last error.
extern "C" void emulator_begin(unsigned seed) {
  emulator::seed = seed;
  emulator::random_order.seed(seed);
  emulator::error.clear();
}

extern "C" const char* emulator_error() { return emulator::error.c_str(); }

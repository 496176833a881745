// Warp operations: lanes meet, exchange bytes and, at __syncwarp, order their memory accesses.
#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace emulator {
namespace {

std::shared_ptr<Meeting> meeting_for(unsigned mask, const char* site) {
  auto& open = block.meetings[current->linear / 32];
  const unsigned self = 1u << here.lane;
  if (!(mask & self)) fail(std::string("a lane is not in its own mask at ") + site);
  if (mask & ~block.live_lanes[current->linear / 32])
    fail(std::string("the mask names a lane that has ended at ") + site);
  for (const auto& meeting : open) {
    if (!(meeting->mask & mask)) continue;
    if (meeting->mask != mask || std::strcmp(meeting->site, site) != 0)
      fail(std::string("divergent warp operation: lanes wait at ") + meeting->site +
           ", this one is at " + site);
    return meeting;
  }
  open.push_back(std::make_shared<Meeting>(Meeting{mask, 0, site, {}, {}}));
  return open.back();
}

std::shared_ptr<Meeting> meet(unsigned mask, const void* bytes, size_t count, const char* site) {
  const std::shared_ptr<Meeting> meeting = meeting_for(mask, site);
  Thread* self = current;
  std::memcpy(meeting->data.bytes[here.lane], bytes, count);
  meeting->arrived |= 1u << here.lane;
  if (meeting->arrived == mask) {
    auto& open = block.meetings[self->linear / 32];
    open.erase(std::find(open.begin(), open.end(), meeting));
    for (Thread* thread : meeting->waiting) block.ready.push_back(thread);
    block.ready.push_back(self);
  } else {
    meeting->waiting.push_back(self);
  }
  self->waits_at = site;
  wait_here();
  self->waits_at = nullptr;
  return meeting;
}

}  // namespace

Exchanged exchange(unsigned mask, const void* bytes, size_t count, const char* site) {
  return meet(mask, bytes, count, site)->data;
}

// Shuffles and votes do not order memory; only this does.
void sync_warp(unsigned mask, const char* site) {
  Thread* first = &block.threads[current->linear / 32 * 32];
  const auto meeting = meet(mask, "", 1, site);
  // The first lane to go on merges the clocks of all, before any of them touches memory again.
  if (meeting->waiting.empty()) return;
  meeting->waiting.clear();
  unsigned merged[32] = {};
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1)
      for (unsigned i = 0; i < 32; ++i) merged[i] = std::max(merged[i], first[lane].clock[i]);
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    std::copy(merged, merged + 32, first[lane].clock);
    ++first[lane].clock[lane];
  }
}

void check_lane(unsigned mask, unsigned source, const char* site) {
  if (source > 31 || !(mask >> source & 1))
    fail("shuffle reads lane " + std::to_string(source) + ", outside its mask, at " + site);
}

}  // namespace emulator

// What LoRA's products on tiles share.
#pragma once

#include "amx/lora_linear.h"
#include "amx/tiles.h"
#include "keep_mask.h"

namespace fasttune::cpu::FASTTUNE_ISA {

// Below, products of fp32 run: at 32 rows they are about as many instructions as splitting a
// factor.
constexpr int64_t kFewestRows = 64;
constexpr int64_t kRowsOfBlock = 2 * kTileSide;  // rows of x or y that share operands

// Threads for `items` blocks after splitting a factor into `tiles` tiles.
inline int team(int threads, int64_t items, int64_t tiles) {
  constexpr int64_t kTilesOfThread = 64;
  const int64_t wanted = std::max(items, tiles / kTilesOfThread);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, wanted)));
}

inline bool on_tiles(DType dtype, int64_t rows, int64_t cols) {
  return dtype == DType::kBFloat16 && rows >= kFewestRows && cols > 0;
}

}  // namespace fasttune::cpu::FASTTUNE_ISA

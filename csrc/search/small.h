// Which codebooks are small: those whose keys are all scored in float32, as a filter would cost more than it saves.
#pragma once

#include "packed.h"
#include <cstdlib>

namespace kvb {

// At most; multiples of kLanes.
constexpr int64_t kSmallKeys = 128, kSmallCoordinates = 1024;
constexpr int64_t kSmallWork = 1 << 16; // multiplications of a query

inline bool is_small(const Layout& layout) {
  return layout.K <= kSmallKeys && layout.D <= kSmallCoordinates && layout.K * layout.D <= kSmallWork;
}

// Whether the distances of all keys are taken at once.
inline bool measures_every(const Layout& layout, int64_t N, int64_t topk, bool float64) {
  static const char* force = std::getenv("KVB_EVERY");
  if (force) return *force == '1';
  const int64_t K = layout.K, D = layout.D;
  if (N < 8 || K > 64) return false;
  if (float64) return layout.K <= 64;
  return K * (D + 26 + 3 * topk) <= 50 + 3 * D * layout.blocks() + topk * (280 + 2 * D);
}

} // namespace kvb

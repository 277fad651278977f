// Which codebooks are small: those whose keys are all scored in float32, as a filter would cost more than it saves.
#pragma once

#include "packed.h"

namespace kvb {

// At most; multiples of kLanes.
constexpr int64_t kSmallKeys = 128, kSmallCoordinates = 512;
constexpr int64_t kSmallWork = 1 << 14; // multiplications of a query

inline bool is_small(const Layout& layout) {
  return layout.K <= kSmallKeys && layout.D <= kSmallCoordinates && layout.K * layout.D <= kSmallWork;
}

} // namespace kvb

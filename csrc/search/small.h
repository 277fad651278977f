// Which codebooks are small, and which searches take the distances of all keys: a filter would cost more than it saves.
#pragma once

#include "packed.h"

namespace kvb {

// A small codebook's keys are all scored in float32. At most; multiples of kLanes.
constexpr int64_t kSmallKeys = 128, kSmallCoordinates = 1024;
constexpr int64_t kSmallWork = 1 << 16; // multiplications of a query

inline bool is_small(const Layout& layout) {
  return layout.K <= kSmallKeys && layout.D <= kSmallCoordinates && layout.K * layout.D <= kSmallWork;
}

// Queries that pay for widening the keys, and for vectors with a lane for each of some queries.
constexpr int64_t kEveryQueries = 8;
// Keys up to which the costs below were measured, and coordinates from which on a distance is long beside its rank.
constexpr int64_t kFewEveryKeys = 64, kLongDistance = 200;
constexpr int64_t kMostWidened = 1 << 20; // numbers of a codebook, of which each thread makes a copy of 8 MB

// What a query takes if all distances are taken: a term of a distance is 1.
inline int64_t cost_every(const Layout& layout, int64_t topk, bool float64) {
  return float64 ? layout.K * (layout.D + 8 + topk) : layout.K * (layout.D + 40 + 5 * topk);
}

// Whether all distances are taken at once: if that costs less than scores and the distances of the best, or if most
// are asked for.
inline bool measures_every(const Layout& layout, int64_t N, int64_t topk, bool float64) {
  const int64_t K = layout.K, D = layout.D;
  if (N < kEveryQueries || K * D > kMostWidened) return false;
  if (K > kFewEveryKeys) return 2 * topk > K || (4 * topk >= K && D >= kLongDistance);
  const bool several = topk > 1;
  const int64_t otherwise = float64 ? 700 + 60 * topk + (several ? 50 : 18) * D
                                    : 200 + 1500 * several + 300 * topk + (3 + 4 * topk) * D;
  return cost_every(layout, topk, float64) <= otherwise;
}

} // namespace kvb

// The search for any machine.
#include "search.h"

#include <cmath>
#include <functional>
#include <vector>

namespace kvb::portable {
namespace {

inline uint32_t lanes_at_least(const float* values, float limit) {
  uint32_t lanes = 0;
  for (int i = 0; i < 16; ++i) lanes |= static_cast<uint32_t>(values[i] >= limit) << i;
  return lanes;
}

inline uint32_t lanes_at_most(const float* values, float limit) {
  uint32_t lanes = 0;
  for (int i = 0; i < 16; ++i) lanes |= static_cast<uint32_t>(values[i] <= limit) << i;
  return lanes;
}

inline float least_of(const float* values, uint32_t lanes) {
  float least = __builtin_inff();
  for (; lanes; lanes &= lanes - 1) least = std::min(least, values[__builtin_ctz(lanes)]);
  return least;
}

#define KVB_WIDTH 4
#define KVB_HALVED 0
#include "search_impl.inc"

} // namespace

const Kernels kernels = {"portable", false, search_rows, pack_codebook};

} // namespace kvb::portable

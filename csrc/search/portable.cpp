// The search for any machine.
#include "search.h"

namespace kvb::portable {
namespace {

#define KVB_WIDTH 4
#include "vectors.inc"

inline uint32_t lanes_at_least(const float* values, float limit) {
  uint32_t lanes = 0;
  for (int i = 0; i < 16; ++i) lanes |= static_cast<uint32_t>(values[i] >= limit) << i;
  return lanes;
}

inline float largest(vec values) {
  return std::max(std::max(values[0], values[1]), std::max(values[2], values[3]));
}

inline float total(vec values) {
  return values[0] + values[1] + (values[2] + values[3]);
}

inline bool any_nan(vec values) {
  return std::isnan(total(values)); // of sums x - x, which are 0 or NaN
}

inline vec load_first(const float* from, int64_t count) {
  vec found = {};
  for (int64_t i = 0; i < count; ++i) found[i] = from[i];
  return found;
}

inline wide widened(const float* from) {
  return __builtin_convertvector(*reinterpret_cast<const half_at*>(from), wide);
}

#include "search.inc"

} // namespace

const Kernels kernels = {
    "portable", false, search_rows, search_small, search_every, pack_codebook, fingerprint, add_finite};

} // namespace kvb::portable

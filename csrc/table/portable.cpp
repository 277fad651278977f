// Gathers and their gradients on any machine.
#include "kernels.h"

namespace kvb::portable {
namespace {

#define KVB_WIDTH 4
#include "../search/vectors.inc"

// So many numbers, those of a whole vector or fewer, and zeros: with a constant count, whole vectors.
template <class Lanes, class T>
[[gnu::always_inline]] inline Lanes load_lanes(const T* from, int64_t count) {
  Lanes found = {};
  for (int64_t i = 0; i < count; ++i) found[i] = widen<Accumulator<T>>(from[i]);
  return found;
}

template <class T>
inline vec load(const T* from) {
  return load_lanes<vec>(from, kWidth);
}

template <class T>
inline auto load_first(const T* from, int64_t count) {
  using Lanes = std::conditional_t<std::is_same_v<T, double>, wide, vec>;
  constexpr int64_t whole = sizeof(Lanes) / sizeof(Accumulator<T>);
  return count == whole ? load(from) : load_lanes<Lanes>(from, count);
}

template <class Sum, class Lanes>
inline void store_part(Sum* to, int64_t count, Lanes value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value[i];
}

template <class T>
inline void store(T* to, vec value) {
  for (int i = 0; i < kWidth; ++i) to[i] = static_cast<T>(value[i]);
}

#include "kernels.inc"

} // namespace

const TableKernels table_kernels = kOfThisSet;

} // namespace kvb::portable

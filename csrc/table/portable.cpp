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

inline vec load_row(const float* from) {
  return load(from);
}
inline wide load_row(const double* from) {
  return load_lanes<wide>(from, kHalf);
}
template <class T>
inline vec load_row(const T* from) {
  return load_lanes<vec>(from, kWidth);
}

template <class T>
inline auto load_part(const T* from, int64_t count) {
  using Lanes = std::conditional_t<std::is_same_v<T, double>, wide, vec>;
  constexpr int64_t whole = sizeof(Lanes) / sizeof(Accumulator<T>);
  return count == whole ? load_row(from) : load_lanes<Lanes>(from, count);
}

template <class Sum, class Lanes>
inline void store_part(Sum* to, int64_t count, Lanes value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value[i];
}

template <class T, class Lanes>
inline void store_row(T* to, Lanes value) {
  for (size_t i = 0; i < sizeof(Lanes) / sizeof(value[0]); ++i) to[i] = static_cast<T>(value[i]);
}

#include "kernels.inc"

} // namespace

const TableKernels table_kernels = kOfThisSet;

} // namespace kvb::portable

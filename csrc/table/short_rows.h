// Arithmetic on rows of a few numbers, where the end of a row takes as long as the rest.
#pragma once

#include <cstdint>
#include <type_traits>

namespace kvb {

constexpr int64_t kVector = 4; // floats of a vector that every machine has

// row[v] = with(row[v], other[v]). Rows are short: a vector that overlaps the one before ends a row of floats, instead
// of single numbers.
template <class A, class B, class F>
inline void update_row(A* __restrict row, const B* __restrict other, int64_t width, const F& with) {
  const auto updated = [&](int64_t v) { return with(row[v], other[v]); };
  if (std::is_same_v<A, float> && std::is_same_v<B, float> && width >= kVector) {
    A last[kVector];
    for (int64_t i = 0; i < kVector; ++i) last[i] = updated(width - kVector + i);
    for (int64_t v = 0; v + kVector <= width; v += kVector)
      for (int64_t i = 0; i < kVector; ++i) row[v + i] = updated(v + i);
    for (int64_t i = 0; i < kVector; ++i) row[width - kVector + i] = last[i];
  } else {
    for (int64_t v = 0; v < width; ++v) row[v] = updated(v);
  }
}

} // namespace kvb

// Squared distances in float64, for the search of float64 on either side.
#pragma once

#include <cstdint>

namespace kvb {

// Squared distances outside these limits, or some of their terms, may have overflowed or underflowed.
constexpr double kLeast = 0x1p-900, kMost = 0x1p1000;

// The sum of squares of ``terms``, by halving as in kvb/reference: one order of summation everywhere.
inline double sum_squares(double* terms, int64_t count) {
  for (int64_t d = 0; d < count; ++d) terms[d] *= terms[d];
  for (int64_t size = count; size > 1; size = size / 2 + size % 2) {
    const int64_t half = size / 2;
    for (int64_t d = 0; d < half; ++d) terms[d] += terms[half + d];
    if (size % 2) terms[half] = terms[size - 1];
  }
  return terms[0];
}

struct Search;

// Searches ``count`` of the B*S positions in one codebook: numbers of every magnitude, with every key, one by one.
void search_float64(const Search& search, int64_t codebook, const int64_t* rows, int64_t count);

} // namespace kvb

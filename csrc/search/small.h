// Which codebooks are small, and which searches take the distances of all keys: a filter would cost more than it saves.
#pragma once

#include "packed.h"

namespace kvb {

// A small codebook's keys are all scored in float32. At most; multiples of kLanes.
constexpr int64_t kSmallKeys = 512, kSmallCoordinates = 1024;
constexpr int64_t kSmallWork = 1 << 16; // multiplications of a query
constexpr int64_t kSurelySmall = 128; // keys up to which no filter is quicker

// How the keys come to a search that does not take all distances.
enum class Keys { kPacked, kAsTheyLie, kPackedForIt };

// What a query takes in one codebook, in nanoseconds as measured with AVX-512. The numbers stand for what grows with
// the keys, with the coordinates, with the keys that are asked for, and with products of these.

// If its float32 scores are taken, and the distances of the best keys.
inline double cost_small(const Layout& layout, int64_t topk) {
  const double K = layout.K, D = layout.D, T = topk;
  const double rank = topk == 1 ? 0 : 25 + (topk < kLanes ? std::min(0.17 * K, 14.0) : 0.17 * K) * T;
  return 20 + 0.12 * K + 0.43 * D + 0.019 * K * D + (9 + 0.14 * D) * T + rank;
}

// If the keys are compared with it as they lie.
inline double cost_directly(const Layout& layout, int64_t topk) {
  return 110 + cost_small(layout, topk) + (0.5 + 0.015 * layout.D) * layout.K;
}

// If a filter finds the keys whose distances are taken.
inline double cost_filtered(const Layout& layout, int64_t topk) {
  const double D = layout.D, T = topk;
  const double more = topk == 1 ? 0 : 40 + (40 + 0.5 * D) * T;
  return 80 + 1.65 * D + (6 + 1.37 * D) * layout.groups() + more;
}

// Whether a codebook is small for such a search.
inline bool is_small(const Layout& layout, int64_t topk) {
  const int64_t K = layout.K, D = layout.D;
  if (K > kSmallKeys || D > kSmallCoordinates || K * D > kSmallWork) return false;
  return K <= kSurelySmall || (topk <= kLanes && cost_small(layout, topk) <= cost_filtered(layout, topk));
}

// Either in float64, of few keys.
inline double cost_in_float64(const Layout& layout, int64_t N, int64_t topk, Keys keys) {
  const double K = layout.K, D = layout.D;
  if (keys == Keys::kAsTheyLie) return 105 + (topk > 1 ? 2.6 : 1.3) * D + 0.06 * K * D;
  return 175 + 15.0 * topk + (topk > 1 ? 6.5 * D : 4.5 * D - 1.2 * K) + 1000.0 / N;
}

constexpr int64_t kEveryQueries = 8; // that are taken at once where all distances are; a rest takes as long
constexpr int64_t kShortRow = 8; // coordinates up to which a term of a distance is all of a sum
constexpr int64_t kPairwiseKeys = 128; // up to which many nearest are found by comparing each pair of keys

// If all distances are taken.
inline double cost_every(const Layout& layout, int64_t N, int64_t topk, bool float64) {
  const double K = layout.K, D = layout.D, T = topk;
  const double groups = static_cast<double>((N + kEveryQueries - 1) / kEveryQueries * kEveryQueries) / N;
  const bool pairwise = topk > 1 && 2 * topk >= layout.K && layout.K <= kPairwiseKeys;
  const double find = groups * (pairwise ? K * (1.1 + 0.064 * K) : T * (6 + 0.14 * K));
  if (float64) return find + groups * (20 + 0.6 * D + K * (1 + 0.1 * D));
  return find + 6 + 0.15 * D + K * (0.048 * D + (layout.D > kShortRow));
}

// Keys up to which the costs were measured, those in float64 among them; and coordinates from which on a distance is
// long beside its rank.
constexpr int64_t kFewEveryKeys = 128, kFewInFloat64 = 64, kLongDistance = 200;
constexpr int64_t kMostWidened = 1 << 20; // numbers of a codebook, of which each thread makes a copy of 8 MB

// Whether all distances are taken at once: if that costs less than scores and the distances of the best, or if most
// are asked for.
inline bool measures_every(const Layout& layout, int64_t N, int64_t topk, bool float64, Keys keys) {
  const int64_t K = layout.K, D = layout.D;
  if (N == 0 || K * D > kMostWidened) return false;
  if (K > (float64 ? kFewInFloat64 : kFewEveryKeys))
    return N >= kEveryQueries && (2 * topk > K || (4 * topk >= K && D >= kLongDistance));
  const bool packs = keys == Keys::kPackedForIt && !float64, lie = keys == Keys::kAsTheyLie && !float64;
  // What the keys of a codebook take beforehand, to be widened rather than packed, or taken as they are.
  const double widen = (lie ? -50 : 50) + 15.0 * K + (packs ? -0.6 : float64 ? 0.2 : 0.05) * K * D;
  const double otherwise = float64 ? cost_in_float64(layout, N, topk, keys)
                           : lie   ? cost_directly(layout, topk)
                                   : cost_small(layout, topk);
  return cost_every(layout, N, topk, float64) + widen / N <= otherwise;
}

} // namespace kvb

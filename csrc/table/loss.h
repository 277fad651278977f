// The loss of a batch, cross entropy with label smoothing, and its gradient.
#pragma once

#include "../glibc.h"
#include "gradient.h"

#include <bit>
#include <cmath>
#include <limits>

namespace kvb {

// exp(x) of a shifted logit, x <= 0, within one unit in the last place; loops over it become vectors. Zero where it
// has no normal number.
inline float exp_of_shifted(float x) {
  // log2(e), and ln(2) as a sum of which the first part has few bits: a product with an integer is exact
  constexpr float kLog2E = 0x1.715476p+0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  constexpr float kInteger = 0x1.8p23f; // added to a number, rounds it to an integer, which its lowest bits hold
  constexpr int32_t kBias = 127, kFraction = 23; // of a float's exponent, and its bits after that
  constexpr int32_t kLowest = std::bit_cast<int32_t>(200.0f); // of -x: far below the logarithm of the smallest number
  constexpr int32_t kInfinity = std::bit_cast<int32_t>(std::numeric_limits<float>::infinity());
  // Masks of integers instead of choices: of those the compiler makes vectors, and NaN stays.
  const int32_t size = std::bit_cast<int32_t>(-x), beyond = -((size > kLowest) & (size <= kInfinity));
  x = -std::bit_cast<float>((kLowest & beyond) | (size & ~beyond));
  const float shifted = x * kLog2E + kInteger, whole = shifted - kInteger;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kInteger) + kBias;
  const float r = (x - whole * kLn2High) - whole * kLn2Low; // at most half of ln(2)
  // (exp(r) - 1 - r) / r^2 where its relative error in exp(r) is the same at all peaks, 3e-9
  const float tail = 0.49999994f + r * (0.16666521f + r * (0.04166839f + r * (0.008368717f + r * 0.0013814598f)));
  const int32_t normal = exponent & ~(exponent >> 31); // or zero
  return (1 + (r + r * r * tail)) * std::bit_cast<float>(normal << kFraction);
}

inline double exp_of_shifted(double x) {
  return std::exp(x);
}

// combine(combine(start, at(0)), at(1)) ... in lanes side by side, each of which waits for its own results only.
template <class Sum, class F, class G>
Sum fold(Sum start, int64_t count, const F& at, const G& combine) {
  constexpr int64_t kLanes = 2 * kVector; // two chains of vectors hide most of the wait
  Sum lanes[kLanes];
  std::fill_n(lanes, kLanes, start);
  int64_t v = 0;
  for (; v + kLanes <= count; v += kLanes)
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = combine(lanes[i], at(v + i));
  for (int64_t i = 0; v < count; ++i, ++v) lanes[i] = combine(lanes[i], at(v));
  for (int64_t i = 1; i < kLanes; ++i) lanes[0] = combine(lanes[0], lanes[i]);
  return lanes[0];
}

// Cross entropy of one sample with label smoothing; ``grad`` gets ``scale`` times its gradient.
template <class Sum>
Sum cross_entropy(const Sum* logits, int64_t V, int64_t target, Sum smoothing, Sum scale, Sum* __restrict grad) {
  const auto add = [](Sum a, Sum b) { return a + b; };
  const auto larger = [](Sum a, Sum b) { return b > a ? b : a; };
  const auto logit = [=](int64_t v) { return logits[v]; };
  const Sum highest = fold(-std::numeric_limits<Sum>::infinity(), V, logit, larger), each = smoothing / V;
  for (int64_t v = 0; v < V; ++v) grad[v] = exp_of_shifted(logits[v] - highest);
  const Sum total = fold(Sum{0}, V, [=](int64_t v) { return grad[v]; }, add);
  const Sum sum = fold(Sum{0}, V, [=](int64_t v) { return logits[v] - highest; }, add);
  const Sum own = (grad[target] / total - each - (1 - smoothing)) * scale;
  for (int64_t v = 0; v < V; ++v) grad[v] = (grad[v] / total - each) * scale;
  grad[target] = own;
  return std::log(total) - (1 - smoothing) * (logits[target] - highest) - each * sum;
}

// Logits [B, V] from means over codebooks [B, S, V], the gradient that each fetched value gets, and the loss. The
// gradient may take the place of the means where S is 1.
template <class Sum>
double losses(const Sum* means, const int64_t* targets, int64_t B, int64_t C, Sum smoothing, Sum* logits,
              Gradient<Sum>& grad) {
  const int64_t S = grad.positions, V = grad.width;
  Vector<Sum> loss(B);
  const Sum scale = static_cast<Sum>(1.0 / (static_cast<double>(B) * S * C));
  parallel(B, kSerialWork / std::max<int64_t>((S + 8) * V, 1), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Sum *const row = logits + b * V, *const slopes = grad.rows.get() + b * V;
      std::fill_n(row, V, Sum{0});
      for (int64_t s = 0; s < S; ++s) add_row(row, means + (b * S + s) * V, V);
      for (int64_t v = 0; v < V; ++v) row[v] /= static_cast<Sum>(S);
      loss[b] = cross_entropy(row, V, targets[b], smoothing, scale, slopes);
      grad.squares[b] = square(slopes, V);
    }
  });
  double total = 0;
  for (Sum one : loss) total += one;
  return total / B;
}

} // namespace kvb

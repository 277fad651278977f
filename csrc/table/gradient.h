// What the ways to take a step share: the values and the codes that they read, and the rows of the gradient.
#pragma once

#include "pooled.h"
#include "short_rows.h"

namespace kvb {

// --- rows of values and gradients ------------------------------------------------------------------------------------

template <class Sum, class T>
inline void add_short_row(Sum* sums, const T* row, int64_t width) {
  update_row(sums, row, width, [](Sum sum, T value) { return sum + widen<Sum>(value); });
}

template <class Sum>
double square(const Sum* row, int64_t width) {
  double totals[kVector] = {}; // one alone would wait for each addition
  int64_t v = 0;
  for (; v + kVector <= width; v += kVector)
    for (int64_t i = 0; i < kVector; ++i) totals[i] += static_cast<double>(row[v + i]) * row[v + i];
  for (; v < width; ++v) totals[0] += static_cast<double>(row[v]) * row[v];
  return (totals[0] + totals[1]) + (totals[2] + totals[3]);
}

// The gradient rows of fetched values: [B, V], the same one for all S positions of a sample.
template <class Sum>
struct Gradient {
  Buffer<Sum> rows; // undefined at first: the threads that compute them are the first to touch their memory
  Vector<double> squares; // [B]
  int64_t width, positions; // V, S

  Gradient(Buffer<Sum> rows, int64_t samples, int64_t positions, int64_t width)
      : rows(std::move(rows)), squares(samples), width(width), positions(positions) {}

  int64_t sample(int64_t position) const {
    return positions == 1 ? position : position / positions; // a division takes longer than all else
  }
  const Sum* at(int64_t position) const {
    return rows.get() + sample(position) * width;
  }
};

template <class Sum, class T>
inline void move_row(T* row, const Sum* grad, int64_t width, Sum step) {
  update_row(row, grad, width, [step](T value, Sum slope) { return static_cast<T>(widen<Sum>(value) - step * slope); });
}

// --- codes -----------------------------------------------------------------------------------------------------------

// Those of codebooks [c0, c1) as [books, N]; they follow each other closely, in the same cache lines.
inline void read_codes(const Tensor& indices, int64_t c0, int64_t c1, int32_t* code) {
  with_integer(indices.scalar_type(), [&](auto index) {
    const auto* const all = static_cast<const decltype(index)*>(indices.const_data_ptr());
    const int64_t B = indices.size(0), S = indices.size(1), batch = indices.stride(0), position = indices.stride(1);
    for (int64_t c = c0; c < c1; ++c) {
      const auto* const of = all + c * indices.stride(2);
      for (int64_t b = 0; b < B; ++b)
        for (int64_t s = 0; s < S; ++s) *code++ = static_cast<int32_t>(of[b * batch + s * position]);
    }
  });
}

// --- means over codebooks, rounded as gather rounds them -------------------------------------------------------------

// Of ``count`` totals, the first of ``groups`` that follow each other, to which the others are added.
template <class T, class Sum>
Buffer<Sum> mean_of_groups(Buffer<Sum> totals, int64_t groups, int64_t count, int64_t C) {
  Sum* const sums = totals.get();
  const int64_t whole = groups * count;
  parallel(count, kSerialWork / std::max<int64_t>(groups, 1), [&](int64_t begin, int64_t end) {
    for (int64_t at = count; at < whole; at += count) add_row(sums + begin, sums + at + begin, end - begin);
    for (int64_t i = begin; i < end; ++i) sums[i] = widen<Sum>(static_cast<T>(sums[i] / static_cast<Sum>(C)));
  });
  return totals;
}

// Of a whole table, [N, V].
template <class T, class Sum = Accumulator<T>>
Buffer<Sum> gathered(const T* table, const Tensor& indices, int64_t K, int64_t V) {
  const int64_t count = indices.size(0) * indices.size(1) * V;
  Buffer<T> rounded = new_buffer<T>(count);
  const Table<T> values{table, indices.size(2), K, V};
  const int64_t positions = indices.size(0) * indices.size(1);
  require(gather_pooled(values, walk(indices, {}, K * V, V), positions, true, rounded.get()),
          "indices changed meanwhile");
  if constexpr (std::is_same_v<T, Sum>) {
    return rounded;
  } else {
    Buffer<Sum> means = new_buffer<Sum>(count);
    parallel(count, kSerialWork, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) means[i] = widen<Sum>(rounded[i]);
    });
    return means;
  }
}

} // namespace kvb

// A step of training where a batch fetches most rows of a codebook: a sum for every row is cheaper than lists of those
// that are touched.
#pragma once

#include "gradient.h"

#include <cmath>
#include <numeric>

namespace kvb {

// values -= step * grad; numbers without a gradient keep their bits. In two loops, each of which becomes vectors.
template <class Sum, class T>
void move_numbers(T* __restrict values, const Sum* __restrict grad, int64_t count, Sum step) {
  constexpr int64_t kBlock = 64; // numbers that stay in registers or next to them
  T moved[kBlock];
  for (int64_t at = 0; at < count; at += kBlock, values += kBlock, grad += kBlock) {
    const int64_t block = std::min(kBlock, count - at);
    for (int64_t i = 0; i < block; ++i) moved[i] = static_cast<T>(widen<Sum>(values[i]) - step * grad[i]);
    for (int64_t i = 0; i < block; ++i) values[i] = grad[i] == 0 ? values[i] : moved[i];
  }
}

// One step, in two passes over the codebooks: sum the values; sum the gradients, for their norm and to move the rows.
// Where the norm has to be known first, sums are made twice, which takes no longer than to fetch them from far away.
template <class T>
class CrowdedStep {
  using Sum = Accumulator<T>;

 public:
  CrowdedStep(T* table, int64_t K, int64_t V, const Tensor& indices)
      : table_(table),
        indices_(indices),
        K_(K),
        V_(V),
        C_(indices.size(2)),
        N_(indices.size(0) * indices.size(1)),
        share_((K * V + N_ - 1) / N_),
        books_(std::max(kSummedBooks, C_ / 16)) {}

  static bool pays(const Tensor& values, int64_t positions) {
    const int64_t C = values.size(0), K = values.size(1), V = values.size(2);
    return C > 0 && positions > 0 && 2 * positions >= K && K * V * static_cast<int64_t>(sizeof(Sum)) <= kCachedBytes;
  }

  // Means over codebooks [N, V], rounded as gather rounds them.
  Buffer<Sum> means() const {
    const int64_t count = groups() * N_ * V_;
    // Fewer codebooks than one group, which one thread would sum while the others wait, have the same sums there.
    const bool few = C_ < kSummedBooks;
    if (few || count * static_cast<int64_t>(sizeof(Sum)) > kTotalBytes) return gathered(table_, indices_, K_, V_);
    Buffer<Sum> totals = new_buffer<Sum>(count);
    std::fill_n(totals.get(), count, Sum{0});
    for_codes([&](int64_t c, const int32_t* codes, Vector<Sum>&) {
      Sum* const total = totals.get() + c / books_ * N_ * V_;
      for (int64_t n = 0; n < N_; ++n) {
        fetch_share(c + 1, n);
        add_short_row(total + n * V_, table_ + (c * K_ + codes[n]) * V_, V_);
      }
    });
    return mean_of_groups<T>(std::move(totals), groups(), N_ * V_, C_);
  }

  double norm(const Gradient<Sum>& grad) const {
    return norm_of([&](int64_t, const int32_t* codes, Vector<Sum>& sums) { sum(grad, codes, sums, [](int64_t) {}); });
  }

  void move(const Gradient<Sum>& grad, Sum step) const {
    for_codes([&](int64_t c, const int32_t* codes, Vector<Sum>& sums) { sum_and_move(grad, step, c, codes, sums); });
  }

  // Both in one pass, for a step that does not depend on the norm.
  double norm_and_move(const Gradient<Sum>& grad, Sum step) const {
    return norm_of([&](int64_t c, const int32_t* codes, Vector<Sum>& sums) {
      sum_and_move(grad, step, c, codes, sums);
    });
  }

 private:
  static constexpr int64_t kTotalBytes = 1 << 25; // of sums at every position, one for each group of codebooks

  int64_t groups() const {
    return (C_ + books_ - 1) / books_;
  }

  // visit(c, codes [N], memory of the thread): a group of codebooks stays in one thread.
  template <class F>
  void for_codes(const F& visit) const {
    parallel(groups(), kSerialWork / std::max<int64_t>(N_ * V_ * books_, 1), [&](int64_t begin, int64_t end) {
      Vector<int32_t> codes(books_ * N_);
      Vector<Sum> memory;
      for (int64_t c0 = begin * books_; c0 < std::min(C_, end * books_); c0 += books_) {
        const int64_t c1 = std::min(C_, c0 + books_);
        read_codes(indices_, c0, c1, codes.data());
        for (int64_t c = c0; c < c1; ++c) visit(c, codes.data() + (c - c0) * N_, memory);
      }
    });
  }

  // The norm of all sums, which sum(c, codes, sums) makes codebook by codebook.
  template <class F>
  double norm_of(const F& sum) const {
    Vector<double> squares(C_);
    for_codes([&](int64_t c, const int32_t* codes, Vector<Sum>& sums) {
      sum(c, codes, sums);
      squares[c] = square(sums.data(), K_ * V_);
    });
    return std::sqrt(std::accumulate(squares.begin(), squares.end(), 0.0));
  }

  void sum_and_move(const Gradient<Sum>& grad, Sum step, int64_t c, const int32_t* codes, Vector<Sum>& sums) const {
    sum(grad, codes, sums, [&](int64_t n) { fetch_share(c, n); });
    move_numbers(table_ + c * K_ * V_, sums.data(), K_ * V_, step);
  }

  // The gradient of a codebook [K, V], in batch order; at(n) is called at every position.
  template <class F>
  void sum(const Gradient<Sum>& grad, const int32_t* codes, Vector<Sum>& sums, const F& at) const {
    sums.assign(K_ * V_, Sum{0});
    for (int64_t n = 0; n < N_;) {
      const Sum* const row = grad.at(n);
      for (int64_t s = 0; s < grad.positions; ++s, ++n) {
        at(n);
        add_short_row(sums.data() + codes[n] * V_, row, V_);
      }
    }
  }

  // Fetch the n-th of N shares of a codebook that is needed soon.
  void fetch_share(int64_t c, int64_t n) const {
    const int64_t first = n * share_, count = std::min(share_, K_ * V_ - first);
    if (c < C_ && count > 0) prefetch(table_ + c * K_ * V_ + first, count * sizeof(T));
  }

  T* table_;
  const Tensor& indices_;
  int64_t K_, V_, C_, N_;
  int64_t share_; // numbers of a codebook for each position
  int64_t books_; // codebooks of a group: at least 16 groups, work for many threads, or a cache line of codes
};

} // namespace kvb

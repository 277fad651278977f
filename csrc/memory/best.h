// The greatest of many scores, greatest first; of equal ones the one at the lower index.
#pragma once

#include "memory.h"

#include <cmath>
#include <functional>
#include <limits>

namespace kvb {

// A score and its index as one number, which is the greater the better.
template <class Sum>
using Ranked = std::conditional_t<std::is_same_v<Sum, double>, unsigned __int128, uint64_t>;

// NaN ranks with -Inf, and -0 with +0.
template <class Sum>
inline Ranked<Sum> ranked(Sum score, uint32_t index) {
  using Word = std::conditional_t<std::is_same_v<Sum, double>, uint64_t, uint32_t>;
  constexpr Word sign = Word{1} << (8 * sizeof(Word) - 1);
  const Word bits = std::bit_cast<Word>(score == score ? score + Sum{0} : -std::numeric_limits<Sum>::infinity());
  const Word ordered = bits & sign ? ~bits : bits | sign;
  return Ranked<Sum>{ordered} << 32 | static_cast<uint32_t>(~index);
}

template <class Word>
inline uint32_t index_of(Word one) {
  return ~static_cast<uint32_t>(one);
}

template <class Word>
inline bool same_score(Word one, Word other) {
  return one >> 32 == other >> 32;
}

// Sorts the first ``count``, the greatest first; ``scratch`` has memory for as many, and both for kLanes more.
template <class Word>
void order(Vector<Word>& numbers, int64_t count, Vector<Word>& scratch) {
  if constexpr (std::is_same_v<Word, uint64_t>) {
    if (const MemoryKernels* kernels = memory_kernels(); kernels && count <= kMostOrdered) {
      kernels->order(numbers.data(), count, scratch.data());
      return numbers.swap(scratch);
    }
  }
  std::sort(numbers.begin(), numbers.begin() + count, std::greater<Word>());
}

// Finds the places of all scores that may be among the ``topk`` greatest: few more than those.
template <class Sum>
class Contenders {
 public:
  Contenders(int64_t most, int64_t topk)
      : topk_(topk),
        kernels_(topk <= kMostCounted ? memory_kernels() : nullptr),
        greatest_(std::max(most, kMostGroups)),
        places_(most + kLanes) {}

  // How many there are, at most n; ``place(i)`` says where.
  int64_t find(const Sum* scores, int64_t n) {
    int64_t found = -1;
    if constexpr (std::is_same_v<Sum, float>)
      if (kernels_ && n > topk_) found = kernels_->contenders(scores, n, topk_, greatest_.data(), places_.data());
    return found < 0 ? find_by_sorting(scores, n) : found;
  }
  uint32_t place(int64_t i) const {
    return places_[i];
  }

 private:
  int64_t find_by_sorting(const Sum* scores, int64_t n) {
    const Sum bound = n > topk_ ? lower_bound(scores, n) : -std::numeric_limits<Sum>::infinity();
    int64_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
      places_[found] = static_cast<uint32_t>(i);
      found += !(scores[i] < bound); // no branch: it would often be mispredicted
    }
    return found;
  }
  // The score at the rank, where NaN counts as -Inf.
  Sum lower_bound(const Sum* scores, int64_t n) {
    std::transform(scores, scores + n, greatest_.begin(), [](Sum score) {
      return score == score ? score : -std::numeric_limits<Sum>::infinity();
    });
    std::nth_element(greatest_.begin(), greatest_.begin() + topk_ - 1, greatest_.begin() + n, std::greater<Sum>());
    return greatest_[topk_ - 1];
  }

  int64_t topk_;
  const MemoryKernels* kernels_;
  Vector<Sum> greatest_;
  Vector<uint32_t> places_;
};

} // namespace kvb

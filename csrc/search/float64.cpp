// The search of float64 on either side: every key by direct difference, in float64.
#include "float64.h"

#include "../numbers.h"
#include "positions.h"
#include "search.h"

#include <cmath>
#include <limits>

namespace kvb {
namespace {

// Squared distances outside these limits, or some of their terms, may have overflowed or underflowed.
constexpr double kLeast = 0x1p-900, kMost = 0x1p1000;

// A key and its squared distance, size * 2^power: 2^0 within the limits, else with a size in [0.5, 1) that nothing was
// lost of. So powers, then sizes, are in the order of distances.
struct Found {
  int64_t power;
  double size;
  int64_t key;

  bool operator<(const Found& other) const {
    return std::tie(power, size, key) < std::tie(other.power, other.size, other.key);
  }
  double distance() const {
    return power == 0 ? size : std::ldexp(size, static_cast<int>(power));
  }
};

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

// The positions of one codebook.
template <class Q, class Key>
class Float64Search {
 public:
  Float64Search(const Key* keys, const bool* mask, int64_t K, int64_t D)
      : keys_(keys), K_(K), D_(D), usable_(K), query_(D), terms_(D) {
    for (int64_t k = 0; k < K; ++k) {
      usable_[k] = !mask || mask[k];
      for (int64_t d = 0; d < D; ++d) usable_[k] = usable_[k] && std::isfinite(static_cast<double>(keys[k * D + d]));
    }
  }

  void run(const Q* query, int64_t topk, int64_t* indices, double* distances) {
    bool finite = true;
    for (int64_t d = 0; d < D_; ++d) {
      query_[d] = static_cast<double>(query[d]);
      finite = finite && std::isfinite(query_[d]);
    }
    found_.clear();
    for (int64_t k = 0; finite && k < K_; ++k)
      if (usable_[k]) found_.push_back(measure(k));
    const int64_t found = std::min<int64_t>(found_.size(), topk);
    std::partial_sort(found_.begin(), found_.begin() + found, found_.end());
    for (int64_t t = 0; t < found; ++t) {
      indices[t] = found_[t].key;
      distances[t] = found_[t].distance();
    }
    fill_unused(indices, found, topk);
    const double nothing = finite ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
    std::fill(distances + found, distances + topk, nothing);
  }

 private:
  Found measure(int64_t k) {
    const Key* key = keys_ + k * D_;
    for (int64_t d = 0; d < D_; ++d) terms_[d] = query_[d] - static_cast<double>(key[d]);
    const double distance = sum_squares(terms_.data(), D_);
    return distance >= kLeast && distance <= kMost ? Found{0, distance, k} : measure_scaled(k);
  }

  // The same with differences scaled by a power of two, so that the largest is about 1.
  Found measure_scaled(int64_t k) {
    const Key* key = keys_ + k * D_;
    double most = 0;
    for (int64_t d = 0; d < D_; ++d) most = std::max(most, std::abs(query_[d] - static_cast<double>(key[d])));
    if (most == 0) return {std::numeric_limits<int>::min(), 0, k};
    const bool overflows = std::isinf(most);
    int exponent = 2 + std::numeric_limits<double>::max_exponent, power;
    if (!overflows) std::frexp(most, &exponent);
    for (int64_t d = 0; d < D_; ++d) {
      const double other = static_cast<double>(key[d]);
      terms_[d] = overflows ? std::ldexp(query_[d], -exponent) - std::ldexp(other, -exponent)
                            : std::ldexp(query_[d] - other, -exponent);
    }
    const double size = std::frexp(sum_squares(terms_.data(), D_), &power);
    return {power + 2 * exponent, size, k};
  }

  const Key* keys_;
  const int64_t K_, D_;
  Vector<char> usable_;
  Vector<double> query_, terms_;
  Vector<Found> found_;
};

} // namespace

void search_float64(const Tensor& queries, const Tensor& keys, const bool* mask, int64_t topk, int64_t* indices,
                    double* distances) {
  const int64_t S = queries.size(1), C = queries.size(2), K = keys.size(1), D = keys.size(2);
  const int64_t strides[] = {queries.stride(0), queries.stride(1), queries.stride(2)};
  // A multiplication waits for a conversion, a difference, and the sum before it: eight times a filter's.
  const double cost = static_cast<double>(K) * D * 8;
  with_floating(queries.scalar_type(), [&](auto q) {
    with_floating(keys.scalar_type(), [&](auto k) {
      const auto* const from = static_cast<const decltype(q)*>(queries.const_data_ptr());
      const auto* const table = static_cast<const decltype(k)*>(keys.const_data_ptr());
      over_positions(queries.size(0) * S, C, D, cost, [&](int64_t c, int64_t begin, int64_t end) {
        Float64Search<decltype(q), decltype(k)> search(table + c * K * D, mask ? mask + c * K : nullptr, K, D);
        for (int64_t row = begin; row < end; ++row)
          search.run(from + row / S * strides[0] + row % S * strides[1] + c * strides[2], topk,
                     indices + (row * C + c) * topk, distances + (row * C + c) * topk);
      });
    });
  });
}

} // namespace kvb

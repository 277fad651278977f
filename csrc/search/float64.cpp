// The search of float64 for numbers of every magnitude: every key by direct difference.
#include "float64.h"

#include "search.h"

#include <cmath>
#include <limits>

namespace kvb {
namespace {

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

void search_float64(const Search& search, int64_t codebook, const int64_t* rows, int64_t count) {
  if (count == 0) return;
  const int64_t K = search.layout.K, D = search.layout.D;
  with_floating(search.queries_type, [&](auto q) {
    with_floating(search.keys_type, [&](auto k) {
      const auto* const queries = static_cast<const decltype(q)*>(search.queries);
      const auto* const keys = static_cast<const decltype(k)*>(search.keys) + codebook * K * D;
      Float64Search<decltype(q), decltype(k)> found(keys, search.mask ? search.mask + codebook * K : nullptr, K, D);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = rows[i], out = search.result_offset(row, codebook);
        const int64_t at =
            row / search.S * search.stride_b + row % search.S * search.stride_s + codebook * search.stride_c;
        found.run(queries + at, search.topk, search.indices + out, static_cast<double*>(search.distances) + out);
      }
    });
  });
}

} // namespace kvb

// The search of float64 on either side: every key by direct difference, in float64.
#include "float64.h"

#include "../numbers.h"
#include "positions.h"
#include "search.h"

#include <cmath>
#include <limits>

namespace kvb {
namespace {

template <class Q, class Key>
void search_codebooks(const Q* queries, const Key* keys, const bool* mask, const Layout& layout, const Tensor& shape_of,
                  int64_t topk, int64_t* indices, double* distances) {
  const int64_t S = shape_of.size(1), C = shape_of.size(2), K = layout.K, D = layout.D;
  const int64_t strides[] = {shape_of.stride(0), shape_of.stride(1), shape_of.stride(2)};
  over_positions(shape_of.size(0) * S, C, D, static_cast<double>(K) * D * 8, [&](int64_t c, int64_t begin, int64_t end) {
    Vector<double> q(D), apart(D);
    Vector<std::pair<double, int64_t>> near;
    Vector<char> usable(K);
    for (int64_t k = 0; k < K; ++k) {
      const Key* key = keys + (c * K + k) * D;
      usable[k] = !mask || mask[c * K + k];
      for (int64_t d = 0; d < D; ++d) usable[k] = usable[k] && std::isfinite(static_cast<double>(key[d]));
    }
    for (int64_t row = begin; row < end; ++row) {
      const Q* from = queries + row / S * strides[0] + row % S * strides[1] + c * strides[2];
      bool finite = true;
      for (int64_t d = 0; d < D; ++d) {
        q[d] = static_cast<double>(from[d]);
        finite = finite && std::isfinite(q[d]);
      }
      int64_t* index = indices + (row * C + c) * topk;
      double* distance = distances + (row * C + c) * topk;
      near.clear();
      for (int64_t k = 0; finite && k < K; ++k) {
        if (!usable[k]) continue;
        const Key* key = keys + (c * K + k) * D;
        for (int64_t d = 0; d < D; ++d) {
          const double difference = q[d] - static_cast<double>(key[d]);
          apart[d] = difference * difference;
        }
        // Halving, as in the reference: one order of summation everywhere.
        for (int64_t size = D; size > 1; size = size / 2 + size % 2) {
          const int64_t half = size / 2;
          for (int64_t d = 0; d < half; ++d) apart[d] += apart[half + d];
          if (size % 2) apart[half] = apart[size - 1];
        }
        near.emplace_back(apart[0], k);
      }
      const int64_t found = std::min<int64_t>(near.size(), topk);
      std::partial_sort(near.begin(), near.begin() + found, near.end());
      for (int64_t t = 0; t < found; ++t) {
        index[t] = near[t].second;
        distance[t] = near[t].first;
      }
      fill_unused(index, found, topk);
      const double nothing = finite ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
      std::fill(distance + found, distance + topk, nothing);
    }
  });
}

} // namespace

void search_float64(const Tensor& queries, const Tensor& keys, const bool* mask, int64_t topk, int64_t* indices,
                    double* distances) {
  const Layout layout{keys.size(1), keys.size(2), true, false};
  with_floating(queries.scalar_type(), [&](auto q) {
    with_floating(keys.scalar_type(), [&](auto k) {
      search_codebooks(static_cast<const decltype(q)*>(queries.const_data_ptr()),
                       static_cast<const decltype(k)*>(keys.const_data_ptr()), mask, layout, queries, topk, indices,
                       distances);
    });
  });
}

} // namespace kvb

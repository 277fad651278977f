// What learning keys needs to know of a batch: accumulate (hits and sums of every pair), count (hits alone).
#include "../ops.h"
#include "rows.h"
#include "../search/search.h"

#include <bit>

namespace kvb {
namespace {

// Whether all of a row is finite: x - x is +0 or -0 if x is, and NaN if not. No early exit, so that it vectorises.
template <class T>
bool finite(const T* row, int64_t width) {
  using Sum = Accumulator<T>;
  using Bits = std::conditional_t<std::is_same_v<Sum, double>, uint64_t, uint32_t>;
  constexpr int64_t lanes = 8;
  Bits bad[lanes] = {};
  int64_t d = 0;
  const auto look = [&](int64_t lane) {
    const Sum value = widen<Sum>(row[d + lane]);
    bad[lane] |= std::bit_cast<Bits>(value - value);
  };
  for (; d + lanes <= width; d += lanes)
    for (int64_t lane = 0; lane < lanes; ++lane) look(lane);
  for (; d < width; ++d) look(0);
  Bits any = 0;
  for (Bits lane : bad) any |= lane;
  return any << 1 == 0;
}

void require_queries(const Tensor& queries, const Tensor& indices, int64_t K) {
  require_floating(queries, "queries");
  require(K >= 0, "expected K of at least 0, got ", K);
  require_shape(queries, "queries", {-1, -1, -1, -1});
  require_codes(indices, queries.size(2), K);
  require_shape(indices, "indices", {queries.size(0), queries.size(1), queries.size(2)});
}

// Hits of the finite queries of every pair, and their sums unless ``sums`` is null.
template <class T>
void collect(const Source& queries, int64_t* hits, Accumulator<T>* sums) {
  using Sum = Accumulator<T>;
  const int64_t width = queries.width(), kept = sums ? width : 0;
  const int64_t row_bytes = sizeof(int64_t) + kept * sizeof(Sum);
  const Shares shares = share_out(
      queries.indices.size(2), queries.K, kCachedBytes / row_bytes, (queries.indices.numel() + 1) * width);
  for_shares(shares, [&](int64_t t) {
    for (const RowRange& range : shares[t]) {
      int64_t* const hit = hits + range.first;
      Sum* const sum = sums + range.first * kept;
      std::fill_n(hit, range.rows(), 0);
      std::fill_n(sum, range.rows() * kept, Sum{0});
      if (kept == 0) {
        for_rows<T>(queries, range, [&](const auto* query, int64_t target) { hit[target] += finite(query, width); });
        continue;
      }
      list_source<T>(queries, range, [&](const auto* data, const Row* rows, int64_t listed) {
        if constexpr (std::is_same_v<decltype(data), const float*>) {
          kernels().add_finite(data, rows, listed, width, hit, sum);
        } else {
          visit_listed(data, rows, listed, width, [&](const auto* query, int64_t target) {
            if (!finite(query, width)) return;
            ++hit[target];
            add_row(sum + target * width, query, width);
          });
        }
      });
    }
  });
}

} // namespace

std::tuple<Tensor, Tensor> accumulate(Tensor queries, Tensor indices, int64_t K) {
  require_queries(queries, indices, K);
  const int64_t C = queries.size(2), D = queries.size(3);
  Tensor hits = new_tensor(queries, {C, K}, ScalarType::Long);
  const bool wide = queries.scalar_type() == ScalarType::Double;
  Tensor sums = new_tensor(queries, {C, K, D}, wide ? ScalarType::Double : ScalarType::Float);
  with_floating(queries.scalar_type(), [&](auto query) {
    using T = decltype(query);
    collect<T>(
        {queries, indices, K, false, 1}, hits.mutable_data_ptr<int64_t>(), sums.mutable_data_ptr<Accumulator<T>>());
  });
  return {hits, sums};
}

Tensor count(Tensor queries, Tensor indices, int64_t K) {
  require_queries(queries, indices, K);
  Tensor hits = new_tensor(queries, {queries.size(2), K}, ScalarType::Long);
  with_floating(queries.scalar_type(), [&](auto query) {
    collect<decltype(query)>({queries, indices, K, false, 1}, hits.mutable_data_ptr<int64_t>(), nullptr);
  });
  return hits;
}

} // namespace kvb

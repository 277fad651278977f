// What learning keys needs to know of a batch: accumulate (hits and sums of every pair), count (hits alone).
#include "../ops.h"
#include "rows.h"
#include "../search/search.h"

#include <bit>
#include <cmath>

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
  require_shape(queries, "queries", {-1, -1, -1, -1});
  require_codes(indices, queries.size(2), K);
  require_shape(indices, "indices", {queries.size(0), queries.size(1), queries.size(2)});
}

// The sums of one range of pairs. They are kept in float64, so that float32 numbers are rounded once, at the end,
// however many there are; float64 numbers keep what each addition loses as well (Knuth's TwoSum).
template <class T>
class Sums {
  static constexpr bool kCompensated = std::is_same_v<T, double>;

 public:
  Sums(int64_t rows, int64_t width) : width_(width), sums_(rows * width), lost_(kCompensated ? rows * width : 0) {}

  static int64_t row_bytes(int64_t width) {
    return width * (kCompensated ? 2 : 1) * sizeof(double);
  }

  // Add finite rows, and count them.
  template <class Number>
  void add(const Number* data, const Row* rows, int64_t listed, bool far, int64_t* hits) {
    if constexpr (std::is_same_v<Number, float>) {
      kernels().add_finite(data, rows, listed, width_, far, hits, sums_.data());
    } else {
      visit_listed(data, rows, listed, width_, far, [&](const Number* row, int64_t target) {
        if (!finite(row, width_)) return;
        ++hits[target];
        if constexpr (kCompensated)
          add_compensated(row, target);
        else
          add_row(sums_.data() + target * width_, row, width_);
      });
    }
  }

  void write(Accumulator<T>* to) const {
    for (size_t i = 0; i < sums_.size(); ++i) {
      const double sum = kCompensated ? sums_[i] + lost_[i] : sums_[i];
      to[i] = static_cast<Accumulator<T>>(std::isfinite(sum) ? sum : sums_[i]);
    }
  }

 private:
  void add_compensated(const double* row, int64_t target) {
    double* const sum = sums_.data() + target * width_;
    double* const lost = lost_.data() + target * width_;
    for (int64_t d = 0; d < width_; ++d) {
      const double total = sum[d] + row[d], part = total - sum[d];
      lost[d] += (sum[d] - (total - part)) + (row[d] - part);
      sum[d] = total;
    }
  }

  int64_t width_;
  Vector<double> sums_, lost_;
};

// Hits of the finite queries of every pair, and their sums unless ``sums`` is null.
template <class T>
void collect(const Source& queries, int64_t* hits, Accumulator<T>* sums) {
  const int64_t width = queries.width();
  const bool far = queries.beyond(kSharedBytes);
  const int64_t row_bytes = sizeof(int64_t) + (sums ? Sums<T>::row_bytes(width) : 0);
  const Shares shares = share_out(
      queries.indices.size(2), queries.K, kCachedBytes / row_bytes, (queries.indices.numel() + 1) * width);
  for_shares(shares, [&](int64_t t) {
    for (const RowRange& range : shares[t]) {
      int64_t* const hit = hits + range.first;
      std::fill_n(hit, range.rows(), 0);
      if (!sums) {
        for_rows<T>(queries, range, [&](const auto* query, int64_t target) { hit[target] += finite(query, width); });
        continue;
      }
      Sums<T> kept(range.rows(), width);
      list_source<T>(queries, range, [&](const auto* data, const Row* rows, int64_t listed) {
        kept.add(data, rows, listed, far, hit);
      });
      kept.write(sums + range.first * width);
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

// Values fetched by index and summed over codebooks, a few of them at a time.
#pragma once

#include "rows.h"

namespace kvb {

constexpr int64_t kSummedBooks = 8; // codebooks summed before the total is touched: a cache line of int64 indices

constexpr int64_t kSumsAhead = 4; // sums between the fetch of their rows and their use

template <class T, class Sum>
inline void add_rows(Sum* __restrict total, const T* table, const Row* rows, int64_t books, int64_t width) {
  if (books < kSummedBooks) {
    for (int64_t c = 0; c < books; ++c) add_row(total, table + rows[c].target, width);
    return;
  }
  const T* row[kSummedBooks];
  for (int64_t c = 0; c < kSummedBooks; ++c) row[c] = table + rows[c].target;
  const auto at = [&](int64_t c, int64_t v) { return widen<Sum>(row[c][v]); };
  for (int64_t v = 0; v < width; ++v)
    total[v] += ((at(0, v) + at(1, v)) + (at(2, v) + at(3, v))) + ((at(4, v) + at(5, v)) + (at(6, v) + at(7, v)));
}

// Sums over codebooks at positions [begin, end), a few codebooks at a time: their tables share pages and cache lines.
template <class T, class Sum>
void sum_codebooks(const T* table, const Walk& all, int64_t begin, int64_t end, int64_t width, Row* rows, Sum* totals) {
  std::fill_n(totals, (end - begin) * width, Sum{0});
  for (int64_t c = 0; c < all.size[2]; c += kSummedBooks) {
    const int64_t books = std::min(kSummedBooks, all.size[2] - c);
    const Walk order = with_long_runs(codebooks(all, c, c + books));
    const int64_t listed = list_rows(order, begin * books, end * books, UINT64_MAX, rows);
    Sum* total = totals;
    for (int64_t i = 0; i < listed; i += books, total += width) {
      const int64_t ahead = std::min(listed, i + (kSumsAhead + 1) * books);
      for (int64_t next = i + kSumsAhead * books; next < ahead; ++next)
        prefetch(table + rows[next].target, width * sizeof(T));
      add_rows(total, table, rows + i, books, width);
    }
  }
}

template <class T>
void gather_pooled(const T* table, const Walk& all, int64_t width, bool mean, T* out) {
  using Sum = Accumulator<T>;
  const int64_t C = all.size[2], positions = all.size[0] * all.size[1];
  // Sums of 16 KB, half of an L1 cache; of the rows of a tile, as many are listed at a time as there is room for.
  const int64_t fitting = kListedRows * 4 / std::max<int64_t>(width, 1);
  const int64_t tile = std::clamp<int64_t>(fitting, 1, kListedRows / kSummedBooks);
  const Sum divisor = static_cast<Sum>(mean ? C : 1);
  parallel(positions, kSerialWork / std::max<int64_t>(C * width, 1), [&](int64_t begin, int64_t end) {
    std::array<Row, kListedRows> rows;
    Vector<Sum> totals(tile * width);
    for (int64_t n = begin; n < end; n += tile) {
      const int64_t last = std::min(end, n + tile);
      sum_codebooks(table, all, n, last, width, rows.data(), totals.data());
      for (int64_t v = 0; v < (last - n) * width; ++v) out[n * width + v] = static_cast<T>(totals[v] / divisor);
    }
  });
}

} // namespace kvb

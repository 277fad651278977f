// Values fetched by index and summed over codebooks, or over positions as well.
#pragma once

#include "pointers.h"

namespace kvb {

// Values [books, K, width].
template <class T>
struct Table {
  const T* rows;
  int64_t books, K, width;
};

// ``sums`` sums of as many rows each, in the order of a walk; whether all indices are in [0, K). Where one is not, what
// ``out`` holds is undefined.
template <class T>
[[nodiscard]] bool gather_pooled(
    const Table<T>& table, const Walk& all, int64_t sums, bool mean, T* out) {
  using Sum = Accumulator<T>;
  constexpr bool in_place = std::is_same_v<T, Sum>; // sums are kept where they go
  const RowKernels<T>& kernels = table_kernels().of<T>();
  const int64_t each = sums ? all.positions() / sums : 0, width = table.width;
  // Sums of 16 KB, half of an L1 cache, or as many rows as are listed.
  const int64_t fitting = kListedRows / std::max<int64_t>({1, each, width / 4}), tile = std::max<int64_t>(1, fitting);
  const bool fetch = table.books * table.K * width * static_cast<int64_t>(sizeof(T)) > kTableBytes;
  const Sum divisor = static_cast<Sum>(mean ? each : 1);
  std::atomic<bool> in_range{true};
  parallel(sums, kSerialWork / std::max<int64_t>(each * width, 1), [&](int64_t begin, int64_t end) {
    const int64_t most = std::min(tile, end - begin);
    Pointers<const T> pointers(with_long_runs(all), table.K, table.rows, begin * each, end * each, tile * each);
    const Buffer<const T*> rows = new_buffer<const T*>(most * each);
    const Buffer<Sum> kept = new_buffer<Sum>(in_place ? 0 : most * width);
    for (int64_t n = begin; n < end; n += tile) {
      const int64_t count = std::min(tile, end - n);
      T* const to = out + n * width;
      Sum* total = kept.get();
      if constexpr (in_place) total = to;
      if (!pointers.list(count * each, rows.get())) return in_range.store(false);
      kernels.sum_books(rows.get(), count, each, width, fetch, total);
      if (!in_place || mean) kernels.round_all(total, count * width, divisor, to);
    }
  });
  return in_range;
}

} // namespace kvb

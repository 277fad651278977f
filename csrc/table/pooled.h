// Values fetched by index and summed over codebooks.
#pragma once

#include "pointers.h"

namespace kvb {

// Whether all indices are in [0, K): where one is not, what ``out`` holds is undefined.
template <class T>
[[nodiscard]] bool gather_pooled(const T* table, const Walk& all, int64_t K, int64_t width, bool mean, T* out) {
  using Sum = Accumulator<T>;
  constexpr bool in_place = std::is_same_v<T, Sum>; // sums are kept where they go
  const RowKernels<T>& kernels = table_kernels().of<T>();
  const int64_t C = all.size[2], positions = all.size[0] * all.size[1];
  // Sums of 16 KB, half of an L1 cache, or as many rows as are listed.
  const int64_t fitting = kListedRows / std::max<int64_t>({1, C, width / 4}), tile = std::max<int64_t>(1, fitting);
  const bool fetch = C * K * width * static_cast<int64_t>(sizeof(T)) > kTableBytes;
  const Sum divisor = static_cast<Sum>(mean ? C : 1);
  std::atomic<bool> in_range{true};
  parallel(positions, kSerialWork / std::max<int64_t>(C * width, 1), [&](int64_t begin, int64_t end) {
    const int64_t most = std::min(tile, end - begin);
    Pointers<const T> pointers(with_long_runs(all), K, table, begin * C, end * C, tile * C);
    const Buffer<const T*> rows = new_buffer<const T*>(most * C);
    const Buffer<Sum> kept = new_buffer<Sum>(in_place ? 0 : most * width);
    for (int64_t n = begin; n < end; n += tile) {
      const int64_t count = std::min(tile, end - n);
      T* const to = out + n * width;
      Sum* sums = kept.get();
      if constexpr (in_place) sums = to;
      if (!pointers.list(count * C, rows.get())) return in_range.store(false);
      kernels.sum_books(rows.get(), count, C, width, fetch, sums);
      if (!in_place || mean) kernels.round_all(sums, count * width, divisor, to);
    }
  });
  return in_range;
}

} // namespace kvb

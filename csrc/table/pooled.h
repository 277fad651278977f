// Values fetched by index and summed over codebooks, a few of them at a time.
#pragma once

#include "pointers.h"

namespace kvb {

// How many of C codebooks are summed at a time, in whole groups: what is fetched from shares pages and cache lines.
inline int64_t books_at_a_time(int64_t C, int64_t book_bytes) {
  if (C * book_bytes <= kTableBytes) return std::max<int64_t>(C, 1);
  const int64_t groups = std::max<int64_t>(1, kTableBytes / 2 / book_bytes / kSummedBooks);
  return std::min(groups * kSummedBooks, C);
}

// Whether all indices are in [0, K): where one is not, what ``out`` holds is undefined.
template <class T>
[[nodiscard]] bool gather_pooled(const T* table, const Walk& all, int64_t K, int64_t width, bool mean, T* out) {
  using Sum = Accumulator<T>;
  constexpr bool in_place = std::is_same_v<T, Sum>; // sums are kept where they go
  const RowKernels<T>& kernels = table_kernels().of<T>();
  const int64_t C = all.size[2], positions = all.size[0] * all.size[1], book_bytes = K * width * sizeof(T);
  const int64_t at_a_time = books_at_a_time(C, book_bytes);
  // Sums of 16 KB, half of an L1 cache, or as many rows as are listed.
  const int64_t fitting = std::min(kListedRows * 4 / std::max<int64_t>(width, 1), kListedRows / at_a_time);
  const int64_t tile = std::max<int64_t>(1, fitting);
  const bool fetch = C * book_bytes > kTableBytes;
  const Sum divisor = static_cast<Sum>(mean ? C : 1);
  std::atomic<bool> in_range{true};
  parallel(positions, kSerialWork / std::max<int64_t>(C * width, 1), [&](int64_t begin, int64_t end) {
    std::vector<Pointers<const T>> parts;
    for (int64_t c = 0; c < C; c += at_a_time) {
      const int64_t books = std::min(at_a_time, C - c);
      parts.emplace_back(
          with_long_runs(codebooks(all, c, c + books)), K, table, begin * books, end * books, tile * books);
    }
    const int64_t most = std::min(tile, end - begin);
    const Buffer<const T*> rows = new_buffer<const T*>(most * at_a_time);
    const Buffer<Sum> kept = new_buffer<Sum>(in_place ? 0 : most * width);
    for (int64_t n = begin; n < end; n += tile) {
      const int64_t count = std::min(tile, end - n);
      T* const to = out + n * width;
      Sum* sums = kept.get();
      if constexpr (in_place) sums = to;
      if (C == 0) std::fill_n(sums, count * width, Sum{0});
      for (int64_t c = 0; c < C; c += at_a_time) {
        const int64_t books = std::min(at_a_time, C - c);
        if (!parts[c / at_a_time].list(count * books, rows.get())) return in_range.store(false);
        kernels.add_books(rows.get(), count, books, width, c == 0, fetch, sums);
      }
      if (!in_place || mean) kernels.round_all(sums, count * width, divisor, to);
    }
  });
  return in_range;
}

} // namespace kvb

// Values fetched by index and summed over codebooks, a few of them at a time.
#pragma once

#include "kernels.h"
#include "rows.h"

namespace kvb {

// The codebooks that are summed at a time, so that what is fetched from shares pages and cache lines; whole groups.
inline int64_t books_at_a_time(int64_t book_bytes) {
  return std::max<int64_t>(1, kCachedBytes / std::max<int64_t>(book_bytes, 1) / kSummedBooks) * kSummedBooks;
}

// Whether all indices are in [0, K): where one is not, what ``out`` holds is undefined.
template <class T>
[[nodiscard]] bool gather_pooled(const T* table, const Walk& all, int64_t K, int64_t width, bool mean, T* out) {
  using Sum = Accumulator<T>;
  const RowKernels<T>& kernels = table_kernels().of<T>();
  const int64_t C = all.size[2], positions = all.size[0] * all.size[1], book_bytes = K * width * sizeof(T);
  const int64_t at_a_time = books_at_a_time(book_bytes), most = std::clamp<int64_t>(at_a_time, 1, std::max<int64_t>(C, 1));
  // Sums of 16 KB, half of an L1 cache, and as many listed rows.
  const int64_t fitting = kListedRows * 4 / std::max<int64_t>(width, 1), listed = 2 * kListedRows / most;
  const int64_t tile = std::max<int64_t>(1, std::min(fitting, listed));
  const bool fetch = C * book_bytes > kCachedBytes;
  const Sum divisor = static_cast<Sum>(mean ? C : 1);
  std::atomic<bool> in_range{true};
  parallel(positions, kSerialWork / std::max<int64_t>(C * width, 1), [&](int64_t begin, int64_t end) {
    const int64_t longest = std::min(tile, end - begin);
    Buffer<const T*> rows = new_buffer<const T*>(longest * most);
    Buffer<Sum> sums = new_buffer<Sum>(longest * width);
    for (int64_t n = begin; n < end; n += tile) {
      const int64_t count = std::min(tile, end - n);
      if (C == 0) std::fill_n(sums.get(), count * width, Sum{0});
      for (int64_t c = 0; c < C; c += at_a_time) {
        const int64_t books = std::min(at_a_time, C - c);
        const Walk part = with_long_runs(codebooks(all, c, c + books));
        if (!point_at_rows(part, n * books, (n + count) * books, K, table, rows.get())) return in_range.store(false);
        kernels.add_books(rows.get(), count, books, width, c == 0, fetch, sums.get());
      }
      kernels.round_all(sums.get(), count * width, divisor, out + n * width);
    }
  });
  return in_range;
}

} // namespace kvb

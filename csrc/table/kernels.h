// What gathers and their gradients ask of the code of one instruction set.
#pragma once

#include "../search/search.h"

namespace kvb {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Rows of ``width`` numbers, and sums of them. Whatever the instruction set, the results are the same to the last bit,
// but for the bits of NaN.
template <class T>
struct RowKernels {
  using Sum = Accumulator<T>;

  // For each of ``positions`` the sum of its ``books`` rows, which follow each other in ``rows``; ``fetch`` says
  // whether they are fetched ahead.
  void (*sum_books)(const T* const* rows, int64_t positions, int64_t books, int64_t width, bool fetch, Sum* sums);
  // Adds each listed row of ``data`` to the sum of its target; ``far`` says whether rows come from beyond the L2 cache.
  void (*add_listed)(const T* data, const Row* rows, int64_t listed, int64_t width, bool far, Sum* sums);
  // Adds to each of ``sums``, ``books`` of which follow each other for each of ``positions``, its row of ``data``;
  // ``far`` and ``fetch`` say whether rows of data come from beyond the L2 cache, and whether sums are fetched ahead.
  void (*add_to)(
      const T* data, int64_t position_step, int64_t book_step, int64_t positions, int64_t books, int64_t width,
      bool far, bool fetch, Sum* const* sums);
  // out[i] = numbers[i] / divisor, as a sum's type.
  void (*widen_all)(const T* numbers, int64_t count, Sum divisor, Sum* out);
  // out[i] = sums[i] / divisor, rounded.
  void (*round_all)(const Sum* sums, int64_t count, Sum divisor, T* out);
};

struct TableKernels {
  // rows[i] = origins[i] + codes[i] * step; whether all codes are in [0, K).
  bool (*point_at)(
      const int64_t* codes, const uintptr_t* origins, int64_t count, uint64_t step, int64_t K, uintptr_t* rows);
  // Rows of so many bytes, an even number, one after the other; ``fetch`` says whether they are fetched ahead.
  void (*copy_rows)(const char* const* rows, int64_t count, int64_t bytes, bool fetch, char* out);
  RowKernels<float> float32;
  RowKernels<double> float64;
  RowKernels<Half> float16;
  RowKernels<BFloat16> bfloat16;

  template <class T>
  const RowKernels<T>& of() const {
    if constexpr (std::is_same_v<T, float>)
      return float32;
    else if constexpr (std::is_same_v<T, double>)
      return float64;
    else if constexpr (std::is_same_v<T, Half>)
      return float16;
    else
      return bfloat16;
  }
};

namespace portable {
extern const TableKernels table_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const TableKernels table_kernels;
}
namespace avx512 {
extern const TableKernels table_kernels;
}
#endif

constexpr int64_t kSummedBooks = 8; // codebooks summed in pairs before the total is touched
constexpr int64_t kSummedAhead = 32; // rows between the fetch of one and its use in a sum

// Those that go with the instruction set that the search runs with.
const TableKernels& table_kernels();

} // namespace kvb

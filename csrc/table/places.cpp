// Rows of a table of codebooks, counted over all of them, and their places: a codebook and a pair each.
#include "../ops.h"
#include "rows.h"

#include <atomic>

namespace kvb {
namespace {

void require_numbers(const Tensor& numbers, const char* name) {
  require_cpu(numbers, name);
  require(numbers.scalar_type() == ScalarType::Long, "expected ", name, " torch.int64, got ",
          dtype_name(numbers.scalar_type()));
}

void require_pairs(int64_t K) {
  require(K > 0, "expected at least one pair in a codebook, got ", K);
}

} // namespace

Tensor rows_to_places(Tensor rows, int64_t K) {
  require_numbers(rows, "rows");
  require_shape(rows, "rows", {-1});
  require_pairs(K);
  rows = compact(rows);
  const int64_t count = rows.numel();
  const int64_t* const row = rows.const_data_ptr<int64_t>();
  Tensor places = new_tensor(rows, {2, count}, ScalarType::Long);
  int64_t* const books = places.mutable_data_ptr<int64_t>();
  parallel(count, kSerialWork, [&](int64_t begin, int64_t end) {
    int64_t book = 0; // that of neighbours is mostly the same, and a division takes longer than all else
    for (int64_t i = begin; i < end; ++i) {
      uint64_t pair = static_cast<uint64_t>(row[i]) - static_cast<uint64_t>(book) * K;
      if (pair >= static_cast<uint64_t>(K)) {
        book = row[i] / K - (row[i] % K < 0);
        pair = static_cast<uint64_t>(row[i]) - static_cast<uint64_t>(book) * K;
      }
      books[i] = book;
      books[count + i] = static_cast<int64_t>(pair);
    }
  });
  return places;
}

std::tuple<Tensor, Tensor> places_to_rows(Tensor places, int64_t K) {
  require_numbers(places, "places");
  require_shape(places, "places", {2, -1});
  require_pairs(K);
  places = compact(places);
  const int64_t count = places.size(1);
  const int64_t *const book = places.const_data_ptr<int64_t>(), *const pair = book + count;
  const auto row_of = [&](int64_t i) { // places of any kind: a product that does not fit wraps around
    return static_cast<int64_t>(static_cast<uint64_t>(book[i]) * static_cast<uint64_t>(K) + pair[i]);
  };
  Tensor rows = new_tensor(places, {count}, ScalarType::Long), ascending = new_tensor(places, {}, ScalarType::Bool);
  int64_t* const row = rows.mutable_data_ptr<int64_t>();
  std::atomic<bool> all = true;
  parallel(count, kSerialWork, [&](int64_t begin, int64_t end) {
    bool ordered = true; // no branch in the loop
    int64_t before = begin > 0 ? row_of(begin - 1) : INT64_MIN;
    for (int64_t i = begin; i < end; ++i) {
      row[i] = row_of(i);
      ordered &= before < row[i] || i == 0;
      before = row[i];
    }
    if (!ordered) all = false;
  });
  *ascending.mutable_data_ptr<bool>() = all;
  return {rows, ascending};
}

} // namespace kvb

// A step down the gradient in some rows of a table: move_rows_.
#include "../ops.h"
#include "rows.h"
#include "short_rows.h"

namespace kvb {
namespace {

constexpr int64_t kRowsAhead = 32; // rows between a fetch and its use: all of them come from far away

void require_ascending(const Tensor& rows, int64_t limit) {
  const int64_t *row = rows.const_data_ptr<int64_t>(), count = rows.numel();
  bool ascending = true; // no branch in the loop
  for (int64_t i = 1; i < count; ++i) ascending &= row[i - 1] < row[i];
  require(ascending, "expected rows in ascending order, without repetition");
  if (count == 0 || (row[0] >= 0 && row[count - 1] < limit)) return;
  std::ostringstream message; // out_of_range becomes IndexError in Python
  message << "row " << (row[0] < 0 ? row[0] : row[count - 1]) << " is out of bounds for a table of " << limit;
  throw std::out_of_range(message.str());
}

// As PyTorch rounds the product and the difference.
template <class T>
void move(T* table, const int64_t* rows, const T* grads, int64_t count, int64_t V, Accumulator<T> step) {
  using Sum = Accumulator<T>;
  for (int64_t i = 0; i < count; ++i, grads += V) {
    if (i + kRowsAhead < count) prefetch(table + rows[i + kRowsAhead] * V, V * sizeof(T));
    update_row(table + rows[i] * V, grads, V, [step](T value, T grad) {
      const T slope = static_cast<T>(step * widen<Sum>(grad));
      return static_cast<T>(widen<Sum>(value) - widen<Sum>(slope));
    });
  }
}

} // namespace

void move_rows_(Tensor values, Tensor rows, Tensor grads, double step) {
  require_floating(values, "values");
  require_shape(values, "values", {-1, -1});
  require(values.is_contiguous(), "expected contiguous values, got shape ", shape(values));
  require_cpu(rows, "rows");
  require_shape(rows, "rows", {-1});
  require(rows.scalar_type() == ScalarType::Long, "expected rows int64, got ", dtype_name(rows.scalar_type()));
  require_cpu(grads, "grads");
  const int64_t count = rows.numel(), V = values.size(1);
  require_shape(grads, "grads", {count, V});
  require(grads.scalar_type() == values.scalar_type(), "expected grads ", dtype_name(values.scalar_type()),
          " as values, got ", dtype_name(grads.scalar_type()));
  require_apart(values, "values", rows, "rows");
  require_apart(values, "values", grads, "grads");
  rows = compact(rows);
  grads = compact(grads);
  require_ascending(rows, values.size(0));
  with_floating(values.scalar_type(), [&](auto value) {
    using T = decltype(value);
    T* const table = values.mutable_data_ptr<T>();
    const int64_t* const row = rows.const_data_ptr<int64_t>();
    const T* const grad = grads.const_data_ptr<T>();
    parallel(count, kSerialWork / std::max<int64_t>(V, 1) + 1, [&](int64_t begin, int64_t end) {
      move(table, row + begin, grad + begin * V, end - begin, V, static_cast<Accumulator<T>>(step));
    });
  });
}

} // namespace kvb

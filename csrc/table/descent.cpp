// A gradient of some rows of a table, clipped, and a step down it: clip_rows_, move_rows_.
#include "../ops.h"
#include "rows.h"
#include "short_rows.h"

#include <atomic>

namespace kvb {
namespace {

constexpr int64_t kRowsAhead = 32; // rows between a fetch and its use: all of them come from far away
constexpr int64_t kSummedTogether = 1 << 14; // numbers: the order of a sum is the same on any number of threads
constexpr double kBesideNorm = 1e-6; // what PyTorch adds to a norm before it divides by it

// An index along each axis of a table but the last, for each of some rows: [A, M].
struct Places {
  explicit Places(const Tensor& places)
      : data(places.const_data_ptr<int64_t>()), axes(places.size(0)), count(places.size(1)) {}

  int64_t at(int64_t axis, int64_t i) const {
    return data[axis * count + i];
  }

  // Whether place ``i`` comes after the one before it.
  bool follows(int64_t i) const {
    for (int64_t axis = 0; axis < axes; ++axis)
      if (at(axis, i) != at(axis, i - 1)) return at(axis, i) > at(axis, i - 1);
    return false;
  }

  // Whether those from ``begin`` on all do.
  bool ascend(int64_t begin, int64_t end) const {
    for (int64_t i = std::max<int64_t>(begin, 1); i < end; ++i)
      if (!follows(i)) return false;
    return true;
  }
  bool ascend() const {
    std::atomic<bool> all = true;
    parallel(count, kSerialWork, [&](int64_t begin, int64_t end) {
      if (!ascend(begin, end)) all = false;
    });
    return all;
  }

  const int64_t* data;
  int64_t axes, count;
};

void require_places(const Tensor& places, int64_t axes, int64_t count) {
  require_cpu(places, "places");
  require_shape(places, "places", {axes, count});
  require(places.scalar_type() == ScalarType::Long, "expected places int64, got ", dtype_name(places.scalar_type()));
}

[[noreturn]] void refuse(const Places& places, int64_t i, const Tensor& values) {
  std::ostringstream message; // out_of_range becomes IndexError in Python
  message << "place (";
  for (int64_t axis = 0; axis < places.axes; ++axis) message << (axis ? ", " : "") << places.at(axis, i);
  message << ") is out of bounds for values " << shape(values);
  throw std::out_of_range(message.str());
}

// The numbers of the rows at these places, which come in order.
Vector<int64_t> rows_at(const Places& places, const Tensor& values) {
  Vector<int64_t> rows(places.count);
  std::atomic<bool> ascending = true;
  std::atomic<int64_t> outside = -1;
  parallel(places.count, kSerialWork, [&](int64_t begin, int64_t end) {
    if (!places.ascend(begin, end)) ascending = false;
    for (int64_t i = begin; i < end; ++i) {
      int64_t row = 0;
      for (int64_t axis = 0; axis < places.axes; ++axis) {
        const int64_t index = places.at(axis, i), size = values.size(axis);
        if (index < 0 || index >= size) outside = i;
        row = static_cast<int64_t>(static_cast<uint64_t>(row) * size + index); // of any index: it may wrap around
      }
      rows[i] = row;
    }
  });
  require(ascending, "expected places in ascending order, without repetition");
  if (outside >= 0) refuse(places, outside, values);
  return rows;
}

// As PyTorch rounds the product and the difference.
template <class T>
void move(T* table, const int64_t* rows, const T* grads, int64_t count, int64_t V, Accumulator<T> step) {
  using Sum = Accumulator<T>;
  for (int64_t i = 0; i < count; ++i, grads += V) {
    if (i + kRowsAhead < count) prefetch(table + rows[i + kRowsAhead] * V, V * sizeof(T));
    update_row(table + rows[i] * V, grads, V, [step](T value, T grad) {
      const T slope = static_cast<T>(rounded(step * widen<Sum>(grad)));
      return static_cast<T>(widen<Sum>(value) - widen<Sum>(slope));
    });
  }
}

template <class T>
double sum_of_squares(const T* numbers, int64_t count) {
  const auto square_of = [](T number) { return widen<double>(number) * widen<double>(number); };
  double totals[2 * kVector] = {}; // one alone would wait for each addition
  int64_t i = 0;
  for (; i + 2 * kVector <= count; i += 2 * kVector)
    for (int64_t j = 0; j < 2 * kVector; ++j) totals[j] += square_of(numbers[i + j]);
  for (; i < count; ++i) totals[0] += square_of(numbers[i]);
  double sum = 0;
  for (const double total : totals) sum += total;
  return sum;
}

template <class T>
double norm_of(const T* numbers, int64_t count) {
  Vector<double> parts((count + kSummedTogether - 1) / kSummedTogether);
  parallel(parts.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kSummedTogether;
      parts[part] = sum_of_squares(numbers + first, std::min(kSummedTogether, count - first));
    }
  });
  double sum = 0;
  for (const double part : parts) sum += part;
  return std::sqrt(sum);
}

} // namespace

std::tuple<Tensor, Tensor> clip_rows_(Tensor grads, Tensor places, double max_norm) {
  require_floating(grads, "grads");
  require_shape(grads, "grads", {-1, -1});
  require(grads.is_contiguous(), "expected contiguous grads, got shape ", shape(grads));
  require_places(places, -1, grads.size(0));
  require_apart(grads, "grads", places, "places");
  places = compact(places);
  const int64_t count = grads.numel();
  const bool ascending = Places(places).ascend();
  Tensor fits = new_tensor(grads, {}, ScalarType::Bool), norm;
  with_floating(grads.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using Sum = Accumulator<T>;
    T* const numbers = grads.mutable_data_ptr<T>();
    const Sum length = static_cast<Sum>(norm_of(numbers, count));
    const Sum share = static_cast<Sum>(max_norm) / (length + static_cast<Sum>(kBesideNorm));
    norm = new_tensor(grads, {}, std::is_same_v<Sum, double> ? ScalarType::Double : ScalarType::Float);
    *norm.mutable_data_ptr<Sum>() = length;
    if (!ascending || share >= 1) return; // NaN does not pass
    parallel(count, kSerialWork, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) numbers[i] = static_cast<T>(widen<Sum>(numbers[i]) * share);
    });
  });
  *fits.mutable_data_ptr<bool>() = ascending;
  return {norm, fits};
}

void move_rows_(Tensor values, Tensor places, Tensor grads, double step) {
  require_floating(values, "values");
  const int64_t axes = values.dim() - 1;
  require(axes > 0, "expected values [*, V], got ", shape(values));
  require(values.is_contiguous(), "expected contiguous values, got shape ", shape(values));
  require_places(places, axes, -1);
  require_cpu(grads, "grads");
  const int64_t count = places.size(1), V = values.size(axes);
  require_shape(grads, "grads", {count, V});
  require(grads.scalar_type() == values.scalar_type(), "expected grads ", dtype_name(values.scalar_type()),
          " as values, got ", dtype_name(grads.scalar_type()));
  require_apart(values, "values", places, "places");
  require_apart(values, "values", grads, "grads");
  grads = compact(grads);
  const Vector<int64_t> rows = rows_at(Places(compact(places)), values);
  with_floating(values.scalar_type(), [&](auto value) {
    using T = decltype(value);
    T* const table = values.mutable_data_ptr<T>();
    const T* const grad = grads.const_data_ptr<T>();
    parallel(count, kSerialWork / std::max<int64_t>(V, 1) + 1, [&](int64_t begin, int64_t end) {
      move(table, rows.data() + begin, grad + begin * V, end - begin, V, static_cast<Accumulator<T>>(step));
    });
  });
}

} // namespace kvb

// Rows of a table by index, with weights: gather_weighted, and its derivatives for the weights, gather_dot, and for the
// table, scatter_weighted_rows.
#include "../ops.h"
#include "../table/rows.h"
#include "memory.h"

#include <bit>

namespace kvb {
namespace {

// What both operators take.
struct Fetch {
  const int64_t* indices; // [N, T]
  int64_t N, T, V;
  int64_t stride; // between rows of the table, in elements
};

void require_rows(const Tensor& indices, int64_t limit) {
  const int64_t* row = indices.const_data_ptr<int64_t>();
  int64_t low = 0, high = -1;
  for (int64_t i = 0; i < indices.numel(); ++i) low = std::min(low, row[i]), high = std::max(high, row[i]);
  if (low >= 0 && high < limit) return;
  std::ostringstream message; // out_of_range becomes IndexError in Python
  message << "index " << (low < 0 ? low : high) << " is out of bounds for a table of " << limit << " rows";
  throw std::out_of_range(message.str());
}

// ``other`` are the weights [N, T] or the vectors [N, V]; all three tensors are made readable row by row.
Fetch checked(Tensor& values, Tensor& indices, Tensor& other, const char* name, bool weights) {
  require_floating(values, "values");
  require_floating(other, name);
  require_cpu(indices, "indices");
  require_shape(values, "values", {-1, -1});
  require_shape(indices, "indices", {-1, -1});
  require(indices.scalar_type() == ScalarType::Long, "expected indices torch.int64, got ",
          dtype_name(indices.scalar_type()));
  require_shape(other, name, {indices.size(0), weights ? indices.size(1) : values.size(1)});
  require(other.scalar_type() == values.scalar_type(), "expected ", name, " ", dtype_name(values.scalar_type()),
          " as values, got ", dtype_name(other.scalar_type()));
  if (values.stride(1) != 1) values = compact(values);
  indices = compact(indices);
  other = compact(other);
  require_rows(indices, values.size(0));
  return {indices.const_data_ptr<int64_t>(), indices.size(0), indices.size(1), values.size(1), values.stride(0)};
}

// work(n, t, row) for every fetched row of samples [begin, end).
template <class T, class F>
void for_fetched(const Fetch& fetch, const T* table, int64_t begin, int64_t end, const F& work) {
  const int64_t last = end * fetch.T, bytes = fetch.V * static_cast<int64_t>(sizeof(T));
  for (int64_t n = begin, at = begin * fetch.T; n < end; ++n) {
    for (int64_t t = 0; t < fetch.T; ++t, ++at) {
      if (at + kAhead < last) prefetch(table + fetch.indices[at + kAhead] * fetch.stride, bytes);
      work(n, t, table + fetch.indices[at] * fetch.stride);
    }
  }
}

int64_t samples_per_thread(const Fetch& fetch) {
  return kSerialWork / std::max<int64_t>(1, fetch.T * fetch.V);
}

template <class T>
void sum_weighted(const Fetch& fetch, const T* table, const T* weights, T* out) {
  using Sum = Accumulator<T>;
  const MemoryKernels* const kernels = memory_kernels();
  parallel(fetch.N, samples_per_thread(fetch), [&](int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<T, float>)
      if (kernels)
        return kernels->sum_weighted(
            table, fetch.stride, fetch.V, fetch.indices, weights, fetch.T, begin, end, out);
    Vector<Sum> sums(fetch.V);
    Sum* const sum = sums.data();
    if (fetch.T == 0) std::fill(out + begin * fetch.V, out + end * fetch.V, T{});
    for_fetched(fetch, table, begin, end, [&](int64_t n, int64_t t, const T* row) {
      const Sum weight = widen<Sum>(weights[n * fetch.T + t]);
      if (t == 0) std::fill_n(sum, fetch.V, Sum{0});
      for (int64_t v = 0; v < fetch.V; ++v) sum[v] += weight * widen<Sum>(row[v]);
      if (t + 1 == fetch.T)
        std::transform(sum, sum + fetch.V, out + n * fetch.V, [](Sum one) { return static_cast<T>(one); });
    });
  });
}

constexpr int64_t kPartialSums = 16; // of an inner product, side by side: whole vectors

template <class T>
Accumulator<T> dot(const T* left, const T* right, int64_t V) {
  using Sum = Accumulator<T>;
  Sum parts[kPartialSums] = {}, total = 0;
  int64_t v = 0;
  for (; v + kPartialSums <= V; v += kPartialSums)
    for (int64_t i = 0; i < kPartialSums; ++i) parts[i] += widen<Sum>(left[v + i]) * widen<Sum>(right[v + i]);
  for (; v < V; ++v) total += widen<Sum>(left[v]) * widen<Sum>(right[v]);
  for (const Sum part : parts) total += part;
  return total;
}

// --- the gradient of the table ---------------------------------------------------------------------------------------

// Numbers the rows that indices name in ascending order, and lists them; how many there are.
int64_t number_rows(const int64_t* indices, int64_t count, int64_t K, int32_t* slots, int64_t* rows) {
  Vector<uint64_t> bits((K + 63) / 64);
  for (int64_t i = 0; i < count; ++i) bits[indices[i] / 64] |= uint64_t{1} << (indices[i] % 64);
  int64_t found = 0;
  for (size_t word = 0; word < bits.size(); ++word) {
    for (uint64_t left = bits[word]; left; left &= left - 1, ++found) {
      rows[found] = static_cast<int64_t>(word) * 64 + std::countr_zero(left);
      slots[rows[found]] = static_cast<int32_t>(found);
    }
  }
  return found;
}

// Sums of the slots [first, last), in batch order. The first vector of a sum is written, not added: nothing is cleared.
template <class T, class Sum>
void sum_slots(
    const Fetch& fetch, const T* vectors, const T* weights, const int32_t* slots, int64_t first, int64_t last,
    Sum* sums) {
  Vector<char> begun(last - first);
  Vector<Row> listed;
  listed.reserve(kListedRows);
  const auto add_listed = [&] {
    const int64_t count = static_cast<int64_t>(listed.size());
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) prefetch(sums + listed[i + kAhead].target * fetch.V, fetch.V * sizeof(Sum));
      const int64_t slot = listed[i].target;
      const Sum weight = widen<Sum>(weights[listed[i].place]);
      const T* const vector = vectors + listed[i].place / fetch.T * fetch.V;
      Sum* const sum = sums + slot * fetch.V;
      if (begun[slot - first])
        for (int64_t v = 0; v < fetch.V; ++v) sum[v] += rounded(weight * widen<Sum>(vector[v]));
      else
        for (int64_t v = 0; v < fetch.V; ++v) sum[v] = weight * widen<Sum>(vector[v]);
      begun[slot - first] = true;
    }
    listed.clear();
  };
  for (int64_t at = 0; at < fetch.N * fetch.T; ++at) {
    const int64_t slot = slots[fetch.indices[at]];
    if (slot < first || slot >= last) continue;
    listed.push_back({at, slot});
    if (static_cast<int64_t>(listed.size()) == kListedRows) add_listed();
  }
  add_listed();
}

template <class T>
void sum_rows(const Fetch& fetch, const T* vectors, const T* weights, const int32_t* slots, int64_t count, T* out) {
  using Sum = Accumulator<T>;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = std::max<int64_t>((count + threads - 1) / threads, samples_per_thread(fetch));
  parallel(count, share, [&](int64_t first, int64_t last) {
    if constexpr (std::is_same_v<T, Sum>) {
      sum_slots(fetch, vectors, weights, slots, first, last, out);
    } else {
      Vector<Sum> sums((last - first) * fetch.V);
      sum_slots(fetch, vectors, weights, slots, first, last, sums.data() - first * fetch.V);
      std::transform(sums.begin(), sums.end(), out + first * fetch.V, [](Sum sum) { return static_cast<T>(sum); });
    }
  });
}

} // namespace

const MemoryKernels* memory_kernels() {
#if defined(__x86_64__)
  const std::string name = kernels().name;
  if (name.starts_with("avx512") || name == "amx") return &avx512::memory_kernels;
  if (name.starts_with("avx")) return &avx2::memory_kernels;
#endif
  return nullptr;
}

Tensor gather_weighted(Tensor values, Tensor indices, Tensor weights) {
  const Fetch fetch = checked(values, indices, weights, "weights", true);
  Tensor out = new_tensor(values, {fetch.N, fetch.V}, values.scalar_type());
  with_floating(values.scalar_type(), [&](auto value) {
    using T = decltype(value);
    sum_weighted(fetch, values.const_data_ptr<T>(), weights.const_data_ptr<T>(), out.mutable_data_ptr<T>());
  });
  return out;
}

Tensor gather_dot(Tensor values, Tensor indices, Tensor vectors) {
  const Fetch fetch = checked(values, indices, vectors, "vectors", false);
  Tensor out = new_tensor(values, {fetch.N, fetch.T}, values.scalar_type());
  with_floating(values.scalar_type(), [&](auto value) {
    using T = decltype(value);
    const T *table = values.const_data_ptr<T>(), *with = vectors.const_data_ptr<T>();
    T* const to = out.mutable_data_ptr<T>();
    parallel(fetch.N, samples_per_thread(fetch), [&](int64_t begin, int64_t end) {
      for_fetched(fetch, table, begin, end, [&](int64_t n, int64_t t, const T* row) {
        to[n * fetch.T + t] = static_cast<T>(dot(with + n * fetch.V, row, fetch.V));
      });
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> scatter_weighted_rows(Tensor vectors, Tensor indices, Tensor weights, int64_t K) {
  require_floating(vectors, "vectors");
  require_floating(weights, "weights");
  require_cpu(indices, "indices");
  require_shape(indices, "indices", {-1, -1});
  require(indices.scalar_type() == ScalarType::Long, "expected indices torch.int64, got ",
          dtype_name(indices.scalar_type()));
  const int64_t N = indices.size(0), T = indices.size(1);
  require_shape(vectors, "vectors", {N, -1});
  require_shape(weights, "weights", {N, T});
  require(weights.scalar_type() == vectors.scalar_type(), "expected weights ", dtype_name(vectors.scalar_type()),
          " as vectors, got ", dtype_name(weights.scalar_type()));
  require(K >= 0 && K <= std::numeric_limits<int32_t>::max(), "expected K from 0 to 2^31 - 1, got ", K);
  vectors = compact(vectors), indices = compact(indices), weights = compact(weights);
  require_rows(indices, K);
  const int64_t size = std::min(N * T, K), V = vectors.size(1);
  const Fetch fetch = {indices.const_data_ptr<int64_t>(), N, T, V, V};
  Tensor rows = new_tensor(vectors, {size}, ScalarType::Long);
  Tensor grads = new_tensor(vectors, {size, V}, vectors.scalar_type());
  Tensor count = new_tensor(vectors, {1}, ScalarType::Long);
  const Buffer<int32_t> slots = new_buffer<int32_t>(K); // only those of touched rows are ever read
  int64_t* const to = rows.mutable_data_ptr<int64_t>();
  const int64_t touched = number_rows(fetch.indices, N * T, K, slots.get(), to);
  std::fill(to + touched, to + size, int64_t{-1});
  with_floating(vectors.scalar_type(), [&](auto value) {
    using Number = decltype(value);
    Number* const out = grads.mutable_data_ptr<Number>();
    sum_rows(
        fetch, vectors.const_data_ptr<Number>(), weights.const_data_ptr<Number>(), slots.get(), touched, out);
    std::fill(out + touched * V, out + size * V, Number{});
  });
  *count.mutable_data_ptr<int64_t>() = touched;
  return {rows, grads, count};
}

} // namespace kvb

// Values fetched by index, and the gradient of that: gather, gather_backward, gather_backward_rows.
#include "../ops.h"
#include "pooled.h"
#include "scatter.h"

#include <bit>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace kvb {
namespace {

constexpr int64_t kMapped = 1 << 25; // bytes from which malloc maps fresh pages, at glibc's highest threshold

// An uninitialised output. Faulting in fresh pages of 4 KB costs more than writing them: ask for large ones.
Tensor new_output(const Tensor& like, std::initializer_list<int64_t> sizes) {
  Tensor out = new_tensor(like, sizes, like.scalar_type());
#ifdef __linux__
  constexpr uintptr_t page = 1 << 21;
  const int64_t bytes = out.numel() * element_bytes(out.scalar_type());
  if (bytes >= kMapped) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
    const uintptr_t first = (begin + page - 1) / page * page;
    madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / page * page, MADV_HUGEPAGE);
  }
#endif
  return out;
}

// --- gather ----------------------------------------------------------------------------------------------------------

// Whether rows of so many bytes can be written past the caches, and should be: an output that no cache holds would
// otherwise be read before it is written.
bool streams(const char* out, int64_t row_bytes, int64_t bytes) {
#ifdef __SSE2__
  return bytes >= kMapped && row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
#else
  return false;
#endif
}

// ``bytes`` of all rows are written in whole vectors.
inline void stream_rows(const char* const* rows, int64_t count, int64_t bytes, char* __restrict out) {
#ifdef __SSE2__
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) prefetch(rows[i + kAhead], bytes);
    for (int64_t at = 0; at < bytes; at += 16, out += 16)
      _mm_stream_si128(
          reinterpret_cast<__m128i*>(out), _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + at)));
  }
#endif
}

// Rows of ``table`` one after the other, in the order of ``order``, which counts in bytes; whether all indices are in
// [0, K).
[[nodiscard]] bool gather_each(
    const char* table, const Walk& order, int64_t K, int64_t row_bytes, bool fetch, char* out) {
  const bool streaming = streams(out, row_bytes, order.positions() * row_bytes);
  std::atomic<bool> in_range{true};
  parallel(order.positions(), kSerialWork * 4 / std::max<int64_t>(row_bytes, 1), [&](int64_t begin, int64_t end) {
    std::array<const char*, kListedRows> rows;
    const int64_t period = order.size[2], length = period < kListedRows ? kListedRows / period * period : kListedRows;
    Pointers<const char> pointers(order, K, table, begin, end, length);
    char* to = out + begin * row_bytes;
    for (int64_t at = begin; at < end; at += length, to += length * row_bytes) {
      const int64_t listed = std::min(length, end - at);
      if (!pointers.list(listed, rows.data())) return in_range.store(false);
      if (streaming)
        stream_rows(rows.data(), listed, row_bytes, to);
      else
        table_kernels().copy_rows(rows.data(), listed, row_bytes, fetch, to);
    }
#ifdef __SSE2__
    if (streaming) _mm_sfence();
#endif
  });
  return in_range;
}

// --- gradients -------------------------------------------------------------------------------------------------------

void require_grad(const Tensor& grad, const Tensor& indices, int64_t K, const std::string& pool) {
  require_floating(grad, "grad");
  require_pool(pool);
  require(indices.dim() == 3, "expected indices [B, S, C], got ", shape(indices));
  const int64_t B = indices.size(0), S = indices.size(1), C = indices.size(2);
  pool == "none" ? require_shape(grad, "grad", {B, S, C, -1}) : require_shape(grad, "grad", {B, S, -1});
  require_indices(indices, C, K);
}

Source source_of(const Tensor& grad, const Tensor& indices, int64_t K, const std::string& pool) {
  return {grad, indices, K, pool != "none", pool == "mean" ? indices.size(2) : 1};
}

// The most rows a range may have for ``bytes`` a row to stay in cache.
int64_t cached_rows(int64_t bytes) {
  return kCachedBytes / std::max<int64_t>(bytes, 1);
}

template <class T>
void clear(T* numbers, int64_t count) {
  if (count > 0) std::memset(static_cast<void*>(numbers), 0, count * sizeof(T)); // an empty tensor has no memory
}

// The rows of one range that any index points at.
struct TouchedRows {
  RowRange range;
  Vector<uint64_t> bits;
  int64_t count;
  int64_t place = 0; // of the first of them in the output
};

TouchedRows find_touched(const Source& source, const RowRange& range) {
  TouchedRows touched{range, Vector<uint64_t>((range.rows() + 63) / 64), 0};
  for_targets(source.indices, source.K, range, [&](int64_t target) {
    uint64_t& word = touched.bits[target / 64];
    const uint64_t bit = uint64_t{1} << (target % 64);
    touched.count += !(word & bit);
    word |= bit;
  });
  return touched;
}

// Number the touched rows in ascending order: slots[row of the range] is its place among them.
void number_rows(const TouchedRows& touched, int64_t* slots, int64_t* rows) {
  int64_t slot = 0;
  for (size_t word = 0; word < touched.bits.size(); ++word) {
    for (uint64_t bits = touched.bits[word]; bits; bits &= bits - 1, ++slot) {
      const int64_t row = static_cast<int64_t>(word) * 64 + std::countr_zero(bits);
      slots[row] = slot;
      rows[slot] = touched.range.first + row;
    }
  }
}

// Adds the rows of one range to the sums in the places slot(row of the range).
template <class T, class F>
void add_source(const Source& source, const RowRange& range, const F& slot, Accumulator<T>* sums) {
  const bool far = source.beyond(kSharedBytes);
  list_source<T>(source, range, [&](const auto* data, Row* rows, int64_t listed) {
    for (int64_t i = 0; i < listed; ++i) rows[i].target = slot(rows[i].target);
    using Number = std::remove_const_t<std::remove_pointer_t<decltype(data)>>; // of grad, or staged
    table_kernels().of<Number>().add_listed(data, rows, listed, source.width(), far, sums);
  });
}

// The sums of the touched rows of one range, one after the other.
template <class T>
void sum_touched(const Source& source, const TouchedRows& touched, const int64_t* slots, Accumulator<T>* sums) {
  clear(sums, touched.count * source.width());
  add_source<T>(source, touched.range, [slots](int64_t row) { return slots[row]; }, sums);
}

// All sums of one range, where they are kept in another type: only touched rows are summed and rounded.
template <class T>
void sum_rounded(const Source& source, const RowRange& range, T* out) {
  using Sum = Accumulator<T>;
  const int64_t width = source.width();
  const TouchedRows touched = find_touched(source, range);
  const Buffer<int64_t> slots = new_buffer<int64_t>(range.rows());
  Vector<int64_t> rows(touched.count);
  number_rows(touched, slots.get(), rows.data());
  const Buffer<Sum> sums = new_buffer<Sum>(touched.count * width);
  sum_touched<T>(source, touched, slots.get(), sums.get());
  clear(out, range.rows() * width);
  const Sum* sum = sums.get();
  for (int64_t row : rows) {
    table_kernels().of<T>().round_all(sum, width, 1, out + (row - range.first) * width);
    sum += width;
  }
}

// The whole codebooks of one range, all rows of which are summed; whether all indices are in [0, K).
template <class T>
[[nodiscard]] bool sum_whole(const Source& source, int64_t step, const RowRange& range, T* out) {
  using Sum = Accumulator<T>;
  const int64_t first = range.first / source.K, last = range.last / source.K, count = range.rows() * source.width();
  if constexpr (std::is_same_v<T, Sum>) {
    clear(out, count);
    return add_codebooks<T>(source, step, first, last, out);
  } else {
    const Buffer<Sum> sums = new_buffer<Sum>(count);
    clear(sums.get(), count);
    const bool in_range = add_codebooks<T>(source, step, first, last, sums.get());
    table_kernels().of<T>().round_all(sums.get(), count, 1, out);
    return in_range;
  }
}

template <class T>
void dense_gradient(const Source& source, T* out) {
  using Sum = Accumulator<T>;
  constexpr bool in_place = std::is_same_v<T, Sum>;
  const int64_t width = source.width(), K = source.K, rows = source.indices.size(2) * K;
  const Shares shares = share_out(
      source.indices.size(2), K, cached_rows(width * sizeof(Sum)), (source.indices.numel() + rows) * width);
  const std::optional<int64_t> step = position_step(source);
  const auto is_whole = [&](const RowRange& range) { return range.first % K == 0 && range.last % K == 0; };
  bool whole = step && rows > 0 && (in_place || source.indices.numel() >= rows);
  for (const auto& share : shares) whole = whole && std::all_of(share.begin(), share.end(), is_whole);
  if (!whole) require_in_range(source.indices, K);
  std::atomic<bool> in_range{true};
  for_shares(shares, [&](int64_t t) {
    for (const RowRange& range : shares[t]) {
      T* const to = out + range.first * width;
      if (whole) {
        if (!sum_whole(source, *step, range, to)) in_range = false;
      } else if constexpr (in_place) {
        clear(to, range.rows() * width);
        add_source<T>(source, range, [](int64_t row) { return row; }, to);
      } else {
        sum_rounded<T>(source, range, to);
      }
    }
  });
  if (!in_range) require_in_range(source.indices, K);
}

// --- gradients as merged rows ----------------------------------------------------------------------------------------

// Codes that are sorted, and how many rows the table has for each, at least: a mark takes a thousandth of sorting one.
constexpr int64_t kFewCodes = 1 << 9, kRowsPerCode = 1 << 10;

using TouchedShares = std::vector<std::vector<TouchedRows>>;

TouchedShares find_all_touched(const Source& source, const Shares& shares) {
  TouchedShares touched(shares.size());
  for_shares(shares, [&](int64_t t) {
    for (const RowRange& range : shares[t]) touched[t].push_back(find_touched(source, range));
  });
  int64_t place = 0;
  for (auto& share : touched) {
    for (TouchedRows& one : share) {
      one.place = place;
      place += one.count;
    }
  }
  return touched;
}

// The same for few rows of a large table: they are sorted, where looking at a mark for every row would take longer.
template <class T>
int64_t merged_few(const Source& source, int64_t* rows, T* grads) {
  using Sum = Accumulator<T>;
  const RowRange table{0, source.indices.size(2) * source.K};
  int64_t* end = rows;
  for_targets(source.indices, source.K, table, [&](int64_t row) { *end++ = row; });
  std::sort(rows, end);
  end = std::unique(rows, end);
  const int64_t count = end - rows, size = count * source.width();
  const auto slot = [rows, end](int64_t row) { return std::lower_bound(rows, end, row) - rows; };
  if constexpr (std::is_same_v<T, Sum>) {
    clear(grads, size);
    add_source<T>(source, table, slot, grads);
  } else {
    Vector<Sum> sums(size);
    add_source<T>(source, table, slot, sums.data());
    table_kernels().of<T>().round_all(sums.data(), size, 1, grads);
  }
  return count;
}

// Fills the first rows of ``rows`` and ``grads``; returns how many.
template <class T>
int64_t merged_gradient(const Source& source, int64_t* rows, T* grads) {
  using Sum = Accumulator<T>;
  const int64_t width = source.width(), codes = source.indices.numel();
  if (codes > 0 && codes <= kFewCodes && codes * kRowsPerCode <= source.indices.size(2) * source.K)
    return merged_few<T>(source, rows, grads);
  const Shares shares =
      share_out(source.indices.size(2), source.K, cached_rows(sizeof(int64_t)), source.indices.numel() * width);
  const TouchedShares touched = find_all_touched(source, shares);
  for_shares(shares, [&](int64_t t) {
    Buffer<int64_t> slots;
    Buffer<Sum> scratch;
    for (const TouchedRows& one : touched[t]) {
      slots = new_buffer<int64_t>(one.range.rows()); // only the slots of touched rows are ever read
      number_rows(one, slots.get(), rows + one.place);
      T* to = grads + one.place * width;
      if constexpr (std::is_same_v<T, Sum>) {
        sum_touched<T>(source, one, slots.get(), to);
      } else {
        scratch = new_buffer<Sum>(one.count * width);
        sum_touched<T>(source, one, slots.get(), scratch.get());
        table_kernels().of<T>().round_all(scratch.get(), one.count * width, 1, to);
      }
    }
  });
  int64_t count = 0;
  for (const auto& share : touched)
    for (const TouchedRows& one : share) count += one.count;
  return count;
}

// The tail that stands for no row.
template <class T>
void clear_tail(int64_t begin, int64_t end, int64_t width, int64_t* rows, T* grads) {
  parallel(end - begin, kSerialWork / std::max<int64_t>(width, 1), [&](int64_t first, int64_t last) {
    std::fill(rows + begin + first, rows + begin + last, -1);
    clear(grads + (begin + first) * width, (last - first) * width);
  });
}

} // namespace

Tensor gather(Tensor values, Tensor indices, std::string pool, std::string layout) {
  require_floating(values, "values");
  require_pool(pool);
  const bool together = layout == "bv"; // positions as well as codebooks
  require(together || layout == "bscv" || layout == "bcsv", "expected layout 'bscv', 'bcsv' or 'bv', got '", layout,
          "'");
  require(!together || pool != "none", "expected pool 'mean' or 'sum' for the layout 'bv', got 'none'");
  require_shape(values, "values", {-1, -1, -1});
  const int64_t C = values.size(0), K = values.size(1), V = values.size(2);
  require_indices(indices, C, K);
  if (values.stride(2) != 1) values = compact(values);
  const int64_t B = indices.size(0), S = indices.size(1);
  const ScalarType type = values.scalar_type();

  if (pool != "none") {
    Tensor out = together ? new_output(values, {B, V}) : new_output(values, {B, S, V});
    Walk order = walk(indices, {}, values.stride(0), values.stride(1));
    if (together && order.stride[2] > order.stride[1]) swap_axes(order, 1, 2); // as the indices lie in memory
    with_floating(type, [&](auto value) {
      using T = decltype(value);
      const Table<T> table{values.const_data_ptr<T>(), C, K, V};
      if (!gather_pooled(table, order, together ? B : B * S, pool == "mean", out.mutable_data_ptr<T>()))
        require_in_range(indices, K);
    });
    return out;
  }
  const bool transposed = layout == "bcsv";
  Tensor out = new_output(values, {B, transposed ? C : S, transposed ? S : C, V});
  const int64_t bytes = element_bytes(type);
  const bool fetch = C * K * V * bytes > kTableBytes;
  Walk order = walk(indices, {}, values.stride(0) * bytes, values.stride(1) * bytes);
  if (transposed) swap_axes(order, 1, 2);
  if (!gather_each(
          static_cast<const char*>(values.const_data_ptr()), with_long_runs(order), K, V * bytes, fetch,
          static_cast<char*>(out.mutable_data_ptr())))
    require_in_range(indices, K);
  return out;
}

Tensor gather_backward(Tensor grad, Tensor indices, int64_t K, std::string pool) {
  require_grad(grad, indices, K, pool);
  const Source source = source_of(grad, indices, K, pool);
  Tensor out = new_output(grad, {indices.size(2), K, source.width()});
  with_floating(grad.scalar_type(), [&](auto value) {
    dense_gradient(source, out.mutable_data_ptr<decltype(value)>());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gather_backward_rows(Tensor grad, Tensor indices, int64_t K, std::string pool) {
  require_grad(grad, indices, K, pool);
  require_in_range(indices, K);
  const Source source = source_of(grad, indices, K, pool);
  const int64_t size = std::min(indices.numel(), indices.size(2) * K), width = source.width();
  Tensor rows = new_tensor(grad, {size}, ScalarType::Long);
  Tensor grads = new_output(grad, {size, width});
  Tensor count = new_tensor(grad, {1}, ScalarType::Long);
  with_floating(grad.scalar_type(), [&](auto value) {
    using T = decltype(value);
    int64_t* to = rows.mutable_data_ptr<int64_t>();
    const int64_t touched = merged_gradient(source, to, grads.mutable_data_ptr<T>());
    clear_tail(touched, size, width, to, grads.mutable_data_ptr<T>());
    *count.mutable_data_ptr<int64_t>() = touched;
  });
  return {rows, grads, count};
}

} // namespace kvb

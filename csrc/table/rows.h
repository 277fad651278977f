// Rows of a [C, K, V] table that indices [B, S, C] point at: checks, lists of them, and sums into them.
//
// Everything that moves data first lists where it comes from and where it goes. A list knows no dtype, and lets the
// loop over it look ahead: table rows are fetched from random places.
#pragma once

#include "kernels.h"

#include <array>
#include <atomic>
#include <cstring>
#include <limits>
#include <type_traits>

namespace kvb {

using Sizes = std::array<int64_t, 3>;

constexpr int64_t kCodesAhead = 64; // codes between the fetch of one and its use, where each has a line of its own
constexpr int64_t kTableBytes = 1 << 22; // some L2 caches: from less memory rows arrive without a fetch ahead
constexpr int64_t kSharedBytes = 1 << 25; // most L3 caches
constexpr int64_t kListedRows = 1024; // rows listed at a time: 16 KB, half of an L1 cache
constexpr int64_t kSerialWork = 1 << 15; // elements below which a second thread costs more than it saves: some 10 us
constexpr int64_t kCachedBytes = 1 << 19; // of sums or slots: half of an L2 cache, so that they stay in it

// --- checks ----------------------------------------------------------------------------------------------------------

inline void require_floating(const Tensor& tensor, const char* name) {
  require_cpu(tensor, name);
  require(
      is_floating(tensor.scalar_type()), "expected ", name, " float16, bfloat16, float32 or float64, got ",
      dtype_name(tensor.scalar_type()));
}

inline void require_pool(const std::string& pool) {
  require(pool == "none" || pool == "mean" || pool == "sum", "expected pool 'none', 'mean' or 'sum', got '", pool, "'");
}

// --- walking over indices --------------------------------------------------------------------------------------------

// Cut positions ``begin`` to ``end`` of a box into runs along its last axis: work(x, y, z, length).
template <class F>
void for_runs(const Sizes& size, int64_t begin, int64_t end, const F& work) {
  if (begin >= end) return;
  int64_t z = begin % size[2], y = begin / size[2] % size[1], x = begin / size[2] / size[1];
  while (begin < end) {
    const int64_t length = std::min(size[2] - z, end - begin);
    work(x, y, z, length);
    begin += length;
    z = 0;
    if (++y == size[1]) y = 0, ++x;
  }
}

// A box of indices in the order it is walked through; strides, outermost axis first.
struct Walk {
  const char* data;
  ScalarType type;
  Sizes size, stride;
  Sizes place; // what a step adds to a row's place
  Sizes table; // what a step adds to its target
  int64_t index_step; // what the next higher index adds to its target
  int64_t place_origin = 0, table_origin = 0;

  int64_t positions() const {
    return size[0] * size[1] * size[2];
  }
};

// All indices [B, S, C] in batch order.
inline Walk walk(const Tensor& indices, const Sizes& place, int64_t codebook_step, int64_t pair_step) {
  return Walk{
      static_cast<const char*>(indices.const_data_ptr()),
      indices.scalar_type(),
      {indices.size(0), indices.size(1), indices.size(2)},
      {indices.stride(0), indices.stride(1), indices.stride(2)},
      place,
      {0, 0, codebook_step},
      pair_step};
}

// The part of a walk with codebooks ``first`` to ``last`` only; its last axis must be the codebooks.
inline Walk codebooks(Walk walk, int64_t first, int64_t last) {
  walk.data += first * walk.stride[2] * element_bytes(walk.type);
  walk.place_origin += first * walk.place[2];
  walk.table_origin += first * walk.table[2];
  walk.size[2] = last - first;
  return walk;
}

inline void swap_axes(Walk& walk, int a, int b) {
  for (Sizes* of : {&walk.size, &walk.stride, &walk.place, &walk.table}) std::swap((*of)[a], (*of)[b]);
}

// The same order with axes of size 1 outermost, which makes the runs long.
inline Walk with_long_runs(Walk walk) {
  if (walk.size[2] == 1) swap_axes(walk, 1, 2);
  if (walk.size[2] == 1) swap_axes(walk, 0, 2);
  return walk;
}

inline int64_t at(const Sizes& steps, int64_t x, int64_t y, int64_t z) {
  return x * steps[0] + y * steps[1] + z * steps[2];
}

// List the rows at positions ``begin`` to ``end`` whose target lies in [0, limit); returns how many.
inline int64_t list_rows(const Walk& walk, int64_t begin, int64_t end, uint64_t limit, Row* rows) {
  Row* last = rows;
  with_integer(walk.type, [&](auto index) {
    using Index = decltype(index);
    for_runs(walk.size, begin, end, [&](int64_t x, int64_t y, int64_t z, int64_t length) {
      const Index* code = reinterpret_cast<const Index*>(walk.data) + at(walk.stride, x, y, z);
      int64_t place = walk.place_origin + at(walk.place, x, y, z);
      int64_t table = walk.table_origin + at(walk.table, x, y, z);
      // In registers: the compiler cannot know that writing rows leaves the walk alone.
      const int64_t index_step = walk.index_step, code_step = walk.stride[2], place_step = walk.place[2];
      const int64_t table_step = walk.table[2];
      const uint64_t below = limit;
      Row* next = last;
      const auto list = [&](auto apart) {
        for (int64_t i = 0; i < length; ++i) {
          if (apart) __builtin_prefetch(code + kCodesAhead * code_step);
          const int64_t target = table + static_cast<int64_t>(*code) * index_step;
          *next = {place, target};
          next += static_cast<uint64_t>(target) < below; // no branch: it would be a coin toss
          code += code_step;
          place += place_step;
          table += table_step;
        }
      };
      const int64_t apart = code_step * static_cast<int64_t>(sizeof(Index));
      apart >= kLine ? list(std::true_type{}) : list(std::false_type{});
      last = next;
    });
  });
  return last - rows;
}

// --- the range of indices --------------------------------------------------------------------------------------------

struct Extremes {
  std::atomic<int64_t> low{std::numeric_limits<int64_t>::max()};
  std::atomic<int64_t> high{std::numeric_limits<int64_t>::min()};

  void merge(int64_t lower, int64_t higher) {
    for (int64_t seen = low; lower < seen && !low.compare_exchange_weak(seen, lower);) {
    }
    for (int64_t seen = high; higher > seen && !high.compare_exchange_weak(seen, higher);) {
    }
  }
};

template <class Index>
void find_extremes(const Walk& walk, int64_t begin, int64_t end, Extremes& extremes) {
  Index low = std::numeric_limits<Index>::max(), high = std::numeric_limits<Index>::min();
  for_runs(walk.size, begin, end, [&](int64_t x, int64_t y, int64_t z, int64_t length) {
    const Index* code = reinterpret_cast<const Index*>(walk.data) + at(walk.stride, x, y, z);
    const auto look = [&](int64_t step) {
      for (int64_t i = 0; i < length; ++i) {
        low = std::min(low, code[i * step]);
        high = std::max(high, code[i * step]);
      }
    };
    walk.stride[2] == 1 ? look(1) : look(walk.stride[2]);
  });
  extremes.merge(low, high);
}

// The same indices in the order of memory, repeated ones once, in as few axes as they need.
inline Walk in_memory_order(Walk walk) {
  for (int axis = 0; axis < 3; ++axis) {
    if (walk.stride[axis] == 0) walk.size[axis] = std::min<int64_t>(walk.size[axis], 1);
    if (walk.size[axis] == 1) walk.stride[axis] = std::numeric_limits<int64_t>::max();
  }
  for (const auto& [a, b] : {std::pair{0, 1}, std::pair{1, 2}, std::pair{0, 1}})
    if (walk.stride[a] < walk.stride[b]) swap_axes(walk, a, b);
  for (int axis : {1, 0}) {
    if (walk.size[axis] == 1 || walk.stride[axis] != walk.stride[2] * walk.size[2]) continue;
    walk.size[2] *= walk.size[axis];
    walk.size[axis] = 1;
  }
  for (int axis = 0; axis < 3; ++axis)
    if (walk.size[axis] == 1) walk.stride[axis] = 0;
  return walk;
}

inline void require_in_range(const Tensor& indices, int64_t K) {
  const Walk all = in_memory_order(walk(indices, {}, 0, 1));
  Extremes seen;
  parallel(all.positions(), kSerialWork, [&](int64_t begin, int64_t end) {
    with_integer(all.type, [&](auto index) { find_extremes<decltype(index)>(all, begin, end, seen); });
  });
  if (all.positions() == 0 || (seen.low >= 0 && seen.high < K)) return;
  std::ostringstream message; // out_of_range becomes IndexError in Python
  message << "index " << (seen.low < 0 ? seen.low : seen.high) << " is out of bounds for codebook with " << K
          << " pairs";
  throw std::out_of_range(message.str());
}

// Indices [B, S, C] for codebooks of K pairs, wherever they point.
inline void require_indices(const Tensor& indices, int64_t C, int64_t K) {
  require_cpu(indices, "indices");
  require(
      indices.dim() == 3 && indices.size(2) == C, "expected indices [B, S, ", C, "], got ", shape(indices));
  require(K >= 0, "expected K of at least 0, got ", K);
  require(K <= ((int64_t{1} << 48) - 1) / std::max<int64_t>(C, 1), "expected fewer than 2^48 pairs, got ", C,
          " codebooks of ", K);
  const ScalarType type = indices.scalar_type();
  require(
      type == ScalarType::Byte || type == ScalarType::Char || type == ScalarType::Short || type == ScalarType::Int ||
          type == ScalarType::Long,
      "expected integer indices, got ", dtype_name(type));
}

// Indices [B, S, C] with every one in [0, K).
inline void require_codes(const Tensor& indices, int64_t C, int64_t K) {
  require_indices(indices, C, K);
  require_in_range(indices, K);
}

// Classes int64 [B] with every one in [0, V).
inline void require_classes(const Tensor& targets, int64_t V) {
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < targets.numel(); ++b) {
    if (target[b] >= 0 && target[b] < V) continue;
    std::ostringstream message; // out_of_range becomes IndexError in Python
    message << "target " << target[b] << " is out of bounds for " << V << " classes";
    throw std::out_of_range(message.str());
  }
}

// --- who sums what ---------------------------------------------------------------------------------------------------

// Rows [first, last) of the flattened [C*K] table. One thread sums a row, in batch order: no atomics, and the same
// bits whatever the number of threads.
struct RowRange {
  int64_t first, last;

  int64_t rows() const {
    return last - first;
  }
};

using Shares = std::vector<std::vector<RowRange>>;

// Each thread's share of C*K rows, in ranges of whole codebooks, as many as fit ``wanted`` rows. Shares begin and end
// anywhere, so that one codebook keeps every thread busy.
inline Shares share_out(int64_t C, int64_t K, int64_t wanted, int64_t work) {
  const int64_t total = C * K;
  const int64_t threads = work < kSerialWork ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), total);
  const int64_t group = std::max<int64_t>(1, wanted / std::max<int64_t>(1, K)) * K;
  Shares shares(threads);
  for (int64_t t = 0, begin = 0; t < threads; ++t) {
    const int64_t end = begin + total / threads + (t < total % threads);
    for (int64_t last; begin < end; begin = last) {
      last = std::min(end, begin / K * K + group);
      shares[t].push_back({begin, last});
    }
  }
  return shares;
}

template <class F>
void for_shares(const Shares& shares, const F& work) {
  parallel(static_cast<int64_t>(shares.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) work(t);
  });
}

// --- rows into sums --------------------------------------------------------------------------------------------------

// The rows that go with the indices: a gradient or queries, [B, S, C, width], or a gradient pooled over C.
struct Source {
  const Tensor& tensor;
  const Tensor& indices;
  int64_t K;
  bool pooled;
  int64_t divisor;

  int64_t width() const {
    return tensor.size(tensor.dim() - 1);
  }
  // Rows are read where they lie, unless they are strided or scaled.
  bool staged() const {
    return divisor != 1 || tensor.stride(tensor.dim() - 1) != 1;
  }
  int64_t codebook_step() const {
    return pooled ? 0 : tensor.stride(2);
  }
  // Whether rows, of a line or more each, come from beyond caches of so many bytes: they are fetched long before.
  bool beyond(int64_t cached) const {
    const int64_t element = static_cast<int64_t>(tensor.element_size());
    return !pooled && !staged() && width() * element >= kLine && tensor.numel() * element > cached;
  }
};

// Rows of positions [n0, n1) and codebooks [c0, c1) in the accumulator's type, one after the other.
template <class T, class Sum>
void stage(const Source& source, int64_t n0, int64_t n1, int64_t c0, int64_t c1, Sum* out) {
  const Tensor& tensor = source.tensor;
  const int64_t S = source.indices.size(1), width = source.width(), codebook = source.codebook_step();
  const int64_t batch = tensor.stride(0), position = tensor.stride(1), step = tensor.stride(tensor.dim() - 1);
  const T* data = tensor.const_data_ptr<T>();
  const Sum divisor = static_cast<Sum>(source.divisor);
  const RowKernels<T>& kernels = table_kernels().of<T>();
  for (int64_t n = n0; n < n1; ++n) {
    for (int64_t c = c0; c < c1; ++c, out += width) {
      const T* row = data + n / S * batch + n % S * position + c * codebook;
      if (step == 1)
        kernels.widen_all(row, width, divisor, out);
      else
        for (int64_t v = 0; v < width; ++v) out[v] = widen<Sum>(row[v * step]) / divisor;
    }
  }
}

// Visit the rows of one range that indices [B, S, C] point at, in batch order.
template <class F>
void for_targets(const Tensor& indices, int64_t K, const RowRange& range, const F& visit) {
  const int64_t c0 = range.first / K, c1 = (range.last - 1) / K + 1;
  Walk part = codebooks(walk(indices, {}, K, 1), c0, c1);
  part.table_origin -= range.first;
  part = with_long_runs(part);
  std::array<Row, kListedRows> rows;
  for (int64_t at = 0; at < part.positions(); at += kListedRows) {
    const int64_t end = std::min(part.positions(), at + kListedRows);
    const int64_t listed = list_rows(part, at, end, range.rows(), rows.data());
    for (int64_t i = 0; i < listed; ++i) visit(rows[i].target);
  }
}

// The strides that find a listed row in ``source``, or among the staged rows of one tile.
inline Sizes places(const Source& source, int64_t books) {
  const Tensor& tensor = source.tensor;
  if (!source.staged()) return {tensor.stride(0), tensor.stride(1), source.codebook_step()};
  const int64_t width = source.width(), position = source.pooled ? width : width * books;
  return {source.indices.size(1) * position, position, source.pooled ? 0 : width};
}

// The rows of one range, a tile of positions at a time: they are staged.
template <class T, class F>
void list_staged(const Source& source, Walk part, const RowRange& range, int64_t c0, const F& visit) {
  using Sum = Accumulator<T>;
  const int64_t positions = part.size[0] * part.size[1], books = part.size[2], width = source.width();
  const int64_t staged_books = source.pooled ? 1 : books;
  const int64_t tile = std::max<int64_t>(1, kListedRows / std::max(books, staged_books * width / 8));
  Vector<Row> rows(std::min(tile, positions) * books);
  Vector<Sum> staged(std::min(tile, positions) * staged_books * width);
  for (int64_t n = 0; n < positions; n += tile) {
    const int64_t end = std::min(positions, n + tile);
    part.place_origin = -n * part.place[1];
    const int64_t listed = list_rows(with_long_runs(part), n * books, end * books, range.rows(), rows.data());
    stage<T>(source, n, end, c0, c0 + staged_books, staged.data());
    visit(static_cast<const Sum*>(staged.data()), rows.data(), listed);
  }
}

// List the rows of ``source`` that go to one range, those of each codebook in batch order: visit(data, rows, how many),
// with places in ``data`` and targets in the range; it may change the rows.
template <class T, class F>
void list_source(const Source& source, const RowRange& range, const F& visit) {
  const int64_t c0 = range.first / source.K, c1 = (range.last - 1) / source.K + 1;
  Walk part = walk(source.indices, places(source, c1 - c0), source.K, 1);
  part.table_origin = -range.first;
  part = codebooks(part, c0, c1);
  if (source.staged()) return list_staged<T>(source, part, range, c0, visit);
  if (part.place[2] > part.place[1]) swap_axes(part, 1, 2); // as the rows lie in memory
  part = with_long_runs(part);
  Buffer<Row> rows = new_buffer<Row>(kListedRows);
  for (int64_t at = 0; at < part.positions(); at += kListedRows) {
    const int64_t end = std::min(part.positions(), at + kListedRows);
    const int64_t listed = list_rows(part, at, end, range.rows(), rows.get());
    visit(source.tensor.template const_data_ptr<T>(), rows.get(), listed);
  }
}

// Visit listed rows one by one: visit(row, row of the range); ``far`` says whether they come from beyond the L2 cache.
template <class T, class F>
void visit_listed(const T* data, const Row* rows, int64_t listed, int64_t width, bool far, const F& visit) {
  const int64_t bytes = width * sizeof(T), away = far ? far_ahead(bytes) : 0;
  for (int64_t i = 0; i < listed; ++i) {
    if (far && i + away < listed) prefetch<2>(data + rows[i + away].place, bytes);
    if (i + kAhead < listed) prefetch(data + rows[i + kAhead].place, bytes);
    visit(data + rows[i].place, rows[i].target);
  }
}

template <class T, class F>
void for_rows(const Source& source, const RowRange& range, const F& visit) {
  list_source<T>(source, range, [&](const auto* data, const Row* rows, int64_t listed) {
    visit_listed(data, rows, listed, source.width(), source.beyond(kSharedBytes), visit);
  });
}

template <class Sum, class T>
inline void add_row(Sum* __restrict sums, const T* __restrict row, int64_t width) {
  for (int64_t v = 0; v < width; ++v) sums[v] += widen<Sum>(row[v]);
}

} // namespace kvb

// Pointers to the rows of a [C, K, V] table that indices point at, a list of them at a time.
#pragma once

#include "rows.h"

namespace kvb {

// Whether a walk reads indices one after the other, and its targets repeat with each run.
inline bool in_one_run(const Walk& walk) {
  const auto follows = [&](int axis, int64_t length) {
    return walk.size[axis] == 1 || (walk.stride[axis] == length && walk.table[axis] == 0);
  };
  return walk.stride[2] == 1 && follows(1, walk.size[2]) && follows(0, walk.size[1] * walk.size[2]);
}

// The rows that a walk fetches from position ``begin`` on, in lists that are all as long, but for the last.
template <class T>
class Pointers {
 public:
  Pointers(const Walk& walk, int64_t K, T* table, int64_t begin, int64_t end, int64_t length)
      : walk_(walk), K_(K), table_(table), next_(begin) {
    const int64_t period = walk.size[2];
    if (begin >= end) return;
    if (walk.type != ScalarType::Long || !in_one_run(walk) || (walk.table[2] != 0 && length % period != 0)) return;
    const int64_t count = std::min(length, end - begin), phase = begin % period;
    origins_ = new_buffer<uintptr_t>(count);
    uintptr_t* origin = origins_.get();
    for_runs({1, count, period}, phase, phase + count, [&](int64_t, int64_t, int64_t z, int64_t run) {
      for (int64_t i = z; i < z + run; ++i) *origin++ = address(walk.table_origin + i * walk.table[2]);
    });
  }

  // Point at the next ``count`` rows; whether all their indices are in [0, K). Where one is not, nothing may be read.
  [[nodiscard]] bool list(int64_t count, T** rows) {
    const int64_t begin = next_;
    next_ += count;
    if (!origins_) return list_runs(begin, next_, rows);
    const int64_t* codes = reinterpret_cast<const int64_t*>(walk_.data) + begin;
    return table_kernels().point_at(
        codes, origins_.get(), count, index_bytes(), K_, reinterpret_cast<uintptr_t*>(rows));
  }

 private:
  // In unsigned numbers, as an index may be any.
  uintptr_t address(int64_t element) const {
    return reinterpret_cast<uintptr_t>(table_ + element);
  }
  uint64_t index_bytes() const {
    return walk_.index_step * sizeof(T);
  }

  bool list_runs(int64_t begin, int64_t end, T** rows) const {
    bool outside = false;
    with_integer(walk_.type, [&](auto index) {
      using Index = decltype(index);
      for_runs(walk_.size, begin, end, [&](int64_t x, int64_t y, int64_t z, int64_t length) {
        const Index* code = reinterpret_cast<const Index*>(walk_.data) + at(walk_.stride, x, y, z);
        uintptr_t row = address(walk_.table_origin + at(walk_.table, x, y, z));
        // In registers: the compiler cannot know that writing rows leaves the walk alone.
        const uint64_t index_step = index_bytes(), table_step = walk_.table[2] * sizeof(T), below = K_;
        const int64_t code_step = walk_.stride[2];
        bool beyond = false;
        for (int64_t i = 0; i < length; ++i, code += code_step, row += table_step) {
          const uint64_t pair = static_cast<uint64_t>(*code);
          beyond |= pair >= below;
          rows[i] = reinterpret_cast<T*>(row + pair * index_step);
        }
        rows += length;
        outside |= beyond;
      });
    });
    return !outside;
  }

  Walk walk_;
  int64_t K_;
  T* table_;
  int64_t next_; // position
  Buffer<uintptr_t> origins_; // of the rows of a list, in codebooks; null where indices do not lie in order
};

} // namespace kvb

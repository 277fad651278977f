// What memory layers ask of the code of one instruction set.
#pragma once

#include "../search/search.h"

namespace kvb {

constexpr int64_t kMostCounted = 80; // ranks up to which scores are counted, each against all, and not partly sorted

struct MemoryKernels {
  // Lists the places of scores that may be among the ``topk`` greatest of n, in ascending order, and returns how many;
  // -1 where the scores bound nothing. ``greatest`` has memory for kMostGroups numbers, ``places`` for n + 16.
  int64_t (*contenders)(const float* scores, int64_t n, int64_t topk, float* greatest, uint32_t* places);
  // Sorts ``count`` different numbers, the greatest first; ``numbers`` has memory for kLanes more.
  void (*order)(uint64_t* numbers, int64_t count, uint64_t* ordered);
  // out[n] = sum over t of weights[n, t] * table[indices[n, t]] for n in [begin, end), rows of V numbers.
  void (*sum_weighted)(
      const float* table, int64_t stride, int64_t V, const int64_t* indices, const float* weights, int64_t T,
      int64_t begin, int64_t end, float* out);
};

constexpr int64_t kMostOrdered = 256; // numbers that are ordered by counting the greater ones of each, at most
constexpr int64_t kMostGroups = 2 * kMostCounted; // the most groups of scores, whose greatest ones are counted

// Groups whose greatest scores bound the rank ``topk``: so many that few more scores than that pass, in whole blocks.
inline int64_t groups_of_scores(int64_t topk) {
  return (topk + topk / 2 + kLanes - 1) / kLanes * kLanes;
}

#if defined(__x86_64__)
namespace avx2 {
extern const MemoryKernels memory_kernels;
}
namespace avx512 {
extern const MemoryKernels memory_kernels;
}
#endif

// Those of the instruction set that the search runs with; null where it has none.
const MemoryKernels* memory_kernels();

} // namespace kvb

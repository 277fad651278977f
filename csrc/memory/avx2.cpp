// Memory layers with AVX2 and FMA.
#include "memory.h"

#if defined(__x86_64__)

KVB_TARGET("avx2,fma")
namespace kvb::avx2 {
namespace {

#define KVB_WIDTH 8
#include "../search/vectors.inc"
#include "../search/lanes256.inc"

inline int64_t list_lanes(uint32_t bits, uint32_t first, uint32_t* places) {
  int64_t found = 0;
  for (; bits; bits &= bits - 1) places[found++] = first + static_cast<uint32_t>(__builtin_ctz(bits));
  return found;
}

#include "memory.inc"

} // namespace

const MemoryKernels memory_kernels = of_this_set;

} // namespace kvb::avx2
KVB_TARGET_END

#endif

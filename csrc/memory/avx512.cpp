// Memory layers with AVX-512.
#include "memory.h"

#if defined(__x86_64__)

KVB_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace kvb::avx512 {
namespace {

#define KVB_WIDTH 16
#include "../search/vectors.inc"
#include "../search/lanes512.inc"

inline int64_t list_lanes(uint32_t bits, uint32_t first, uint32_t* places) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i all = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(first)));
  _mm512_storeu_si512(places, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), all));
  return __builtin_popcount(bits);
}

#include "memory.inc"

} // namespace

const MemoryKernels memory_kernels = of_this_set;

} // namespace kvb::avx512
KVB_TARGET_END

#endif

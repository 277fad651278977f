// The search with AVX2 and FMA.
#include "search.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <functional>
#include <vector>

#include "target.h"

KVB_TARGET("avx2,fma")
namespace kvb::avx2 {
namespace {

inline uint32_t lanes_at_least(const float* values, float limit) {
  const __m256 bound = _mm256_set1_ps(limit);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(values), bound, _CMP_GE_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(values + 8), bound, _CMP_GE_OQ));
  return static_cast<uint32_t>(low | high << 8);
}

inline uint32_t lanes_at_most(const float* values, float limit) {
  const __m256 bound = _mm256_set1_ps(limit);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(values), bound, _CMP_LE_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(values + 8), bound, _CMP_LE_OQ));
  return static_cast<uint32_t>(low | high << 8);
}

inline float least_of(const float* values, uint32_t lanes) {
  float least = __builtin_inff();
  for (; lanes; lanes &= lanes - 1) least = std::min(least, values[__builtin_ctz(lanes)]);
  return least;
}

#define KVB_WIDTH 8
#define KVB_HALVED 0
#include "search_impl.inc"

} // namespace

const Kernels kernels = {"avx2", false, search_rows, pack_codebook};

} // namespace kvb::avx2
KVB_TARGET_END

#endif

// Gathers and their gradients with AVX2 and the conversions of float16.
#include "kernels.h"

#if defined(__x86_64__)

KVB_TARGET("avx2,fma,f16c")
namespace kvb::avx2 {
namespace {

#define KVB_WIDTH 8
#include "../search/vectors.inc"
#include "../search/lanes256.inc"
#include "../search/shorts.inc"

// All ones in the first lanes, for a masked load or store.
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(
      _mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first_wide_lanes(int64_t count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}

inline wide load_first(const double* from, int64_t count) {
  return _mm256_maskload_pd(from, first_wide_lanes(count));
}

inline void store_part(float* to, int64_t count, vec value) {
  _mm256_maskstore_ps(to, first_lanes(count), value);
}
inline void store_part(double* to, int64_t count, wide value) {
  _mm256_maskstore_pd(to, first_wide_lanes(count), value);
}

// The low halves of 32-bit lanes.
inline __m128i low_halves(__m256i lanes) {
  return _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
}

// As software rounds: every NaN becomes the same one, here with its sign.
inline void store(Half* to, vec value) {
  const __m128i numbers = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i nan = _mm_or_si128(_mm_and_si128(numbers, _mm_set1_epi16(-0x8000)), _mm_set1_epi16(0x7e00));
  const __m256i unordered = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m128i is_nan = low_halves(_mm256_srli_epi32(unordered, 16));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_blendv_epi8(numbers, nan, is_nan));
}
inline void store(BFloat16* to, vec value) {
  const __m256i bits = reinterpret_cast<__m256i>(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i unordered = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i numbers = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), unordered);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), low_halves(numbers));
}

#include "kernels.inc"

} // namespace

const TableKernels table_kernels = kOfThisSet;

} // namespace kvb::avx2
KVB_TARGET_END

#endif

// Gathers and their gradients with AVX-512.
#include "kernels.h"

#if defined(__x86_64__)

KVB_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace kvb::avx512 {
namespace {

#define KVB_WIDTH 16
#include "../search/vectors.inc"
#include "../search/lanes512.inc"
#include "../search/shorts.inc"

inline uint32_t first_lanes(int64_t count) {
  return (1u << count) - 1;
}

inline wide load_first(const double* from, int64_t count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(count)), from);
}

inline void store_part(float* to, int64_t count, vec value) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(first_lanes(count)), value);
}
inline void store_part(double* to, int64_t count, wide value) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>(first_lanes(count)), value);
}

// As software rounds: every NaN becomes the same one, here with its sign.
inline void store(Half* to, vec value) {
  const __m256i numbers = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i nan = _mm256_or_si256(_mm256_and_si256(numbers, _mm256_set1_epi16(-0x8000)), _mm256_set1_epi16(0x7e00));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_mask_mov_epi16(numbers, is_nan, nan));
}
inline void store(BFloat16* to, vec value) {
  const __m512i bits = reinterpret_cast<__m512i>(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m256i numbers = _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)), nan = _mm256_set1_epi16(0x7fc0);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_mask_mov_epi16(numbers, is_nan, nan));
}

#include "kernels.inc"

} // namespace

const TableKernels table_kernels = kOfThisSet;

} // namespace kvb::avx512
KVB_TARGET_END

#endif

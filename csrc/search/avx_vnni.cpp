// The search with AVX2 and the products of bytes that came after it.
#include "search.h"

#if defined(__x86_64__)

KVB_TARGET("avx2,fma,f16c,avxvnni")
namespace kvb::avx_vnni {
namespace {

#define KVB_WIDTH 8
#include "vectors.inc"
#include "lanes256.inc"

template <int i>
inline ivec spread(const int32_t* queries) {
  return queries[i] - ivec{};
}

inline ivec dot(ivec sum, ivec keys, ivec query) {
  return reinterpret_cast<ivec>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(keys), reinterpret_cast<__m256i>(query)));
}

inline void store_bytes(int8_t* to, ivec values) {
  const __m256i low_bytes = _mm256_set1_epi32(0x0c080400);
  const __m256i four_a_half = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(values), low_bytes);
  const __m256i eight = _mm256_permutevar8x32_epi32(four_a_half, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(eight));
}
#define KVB_DOT
#include "search.inc"

} // namespace

const Kernels kernels = {
    "avx_vnni", true, search_rows, search_small, search_every, pack_codebook, fingerprint, add_finite};

} // namespace kvb::avx_vnni
KVB_TARGET_END

#endif

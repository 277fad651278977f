// The search with AVX-512 and its bfloat16 products: two coordinates of sixteen keys in one instruction.
#include "search.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <functional>
#include <vector>

#include "target.h"

KVB_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
namespace kvb::avx512_bf16 {
namespace {

#include "lanes512.h"

#include "bfloat16.inc"

struct Filter : RoundedQueries<16> {
  static constexpr int MR = 4, NR = 4; // queries and tiles in registers at once

  using RoundedQueries::RoundedQueries;

  void run(const float* q, int64_t q_stride, int64_t rows, const Codebook& book, const float* bias, float* best);

  template <int M>
  void tiles_of(int64_t row, const uint16_t* tiles, const float* bias, float* best) const;
};

#define KVB_WIDTH 16
#define KVB_HALVED 1
#include "search_impl.inc"

// Best scores of M queries over the sixteen tiles of one group.
template <int M>
void Filter::tiles_of(int64_t row, const uint16_t* tiles, const float* bias, float* best) const {
  const int64_t all = parts * pairs, tile_size = all * 32;
  __m512 most[M];
  for (int i = 0; i < M; ++i) most[i] = _mm512_set1_ps(-kInfinity);
  for (int t = 0; t < kLanes; t += NR) {
    __m512 score[M][NR];
    for (int j = 0; j < NR; ++j)
      for (int i = 0; i < M; ++i) score[i][j] = _mm512_loadu_ps(bias + (t + j) * kLanes);
    for (int64_t pair = 0; pair < all; ++pair) {
      __m512bh keys[NR];
      for (int j = 0; j < NR; ++j)
        keys[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(tiles + (t + j) * tile_size + pair * 32));
      for (int i = 0; i < M; ++i) {
        int32_t both;
        std::memcpy(&both, queries.data() + (row + i) * stride + pair * 2, 4);
        const __m512bh query = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
        for (int j = 0; j < NR; ++j) score[i][j] = _mm512_dpbf16_ps(score[i][j], keys[j], query);
      }
    }
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < NR; ++j) most[i] = _mm512_max_ps(most[i], score[i][j]);
  }
  for (int i = 0; i < M; ++i) _mm512_storeu_ps(best + (row + i) * groups * kLanes, most[i]);
}

void Filter::run(const float* q, int64_t q_stride, int64_t rows, const Codebook& book, const float* bias, float* best) {
  round(q, q_stride, rows);
  for (int64_t group = 0; group < groups; ++group) {
    const uint16_t* tiles = book.tiles + group * kLanes * parts * pairs * 32;
    int64_t row = 0;
    for (; row + MR <= rows; row += MR) tiles_of<MR>(row, tiles, bias + group * kGroup, best + group * kLanes);
    for (; row < rows; ++row) tiles_of<1>(row, tiles, bias + group * kGroup, best + group * kLanes);
  }
}

} // namespace

const Kernels kernels = {"avx512_bf16", true, search_rows, pack_codebook};

} // namespace kvb::avx512_bf16
KVB_TARGET_END

#endif

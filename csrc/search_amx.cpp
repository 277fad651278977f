// The search with AMX: sixteen queries times sixteen keys times 32 coordinates in one instruction, on bfloat16.
#include "search.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <functional>
#include <vector>

#include "target.h"

KVB_TARGET("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
namespace kvb::amx {
namespace {

#include "lanes512.h"

// What the tile registers hold: 0 to 3 scores, 4 and 5 keys, 6 and 7 queries. The second sixteen queries use the odd
// scores and register 7.
struct alignas(64) TileConfig {
  TileConfig(int64_t queries, int64_t pairs) {
    const int64_t first = std::min<int64_t>(queries, 16), second = std::max<int64_t>(queries - 16, 1);
    for (int tile : {0, 2}) set(tile, first, 64);
    for (int tile : {1, 3}) set(tile, second, 64);
    for (int tile : {4, 5}) set(tile, pairs, 64);
    set(6, first, 4 * pairs);
    set(7, second, 4 * pairs);
  }
  void set(int tile, int64_t tile_rows, int64_t tile_bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    bytes[tile] = static_cast<uint16_t>(tile_bytes);
  }
  void load() const {
    asm volatile("ldtilecfg %0" ::"m"(*this));
  }
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// The compiler's own macros take no variable as a register number, and promise too little about memory.
template <int Tile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

template <int Tile>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
inline void store_tile(void* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t{64}), "i"(Tile) : "memory");
}

template <int Sum, int A, int B>
inline void accumulate() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

#include "bfloat16.inc"

struct Filter : RoundedQueries<32> {
  static constexpr int64_t kBatch = 4; // tiles of keys whose scores wait for their maximum together

  using RoundedQueries::RoundedQueries;

  ~Filter() {
    if (configured) asm volatile("tilerelease");
  }

  void run(const float* q, int64_t q_stride, int64_t rows, const Codebook& book, const float* bias, float* best);

  template <bool Resident, bool Both>
  void multiply(const uint16_t* tile, float (*scores)[256]) const;
  template <bool Resident, bool Both>
  void all_groups(const uint16_t* tiles, int64_t rows, const float* bias, float* best) const;

  int64_t configured = 0; // rows
};

#define KVB_WIDTH 16
#define KVB_HALVED 1
#include "search_impl.inc"

// Scores of all queries and two tiles of keys: scores[0] and [1] of the first tile, [2] and [3] of the second, the odd
// ones of the second sixteen queries. Resident queries were loaded before.
template <bool Resident, bool Both>
inline void Filter::multiply(const uint16_t* tile, float (*scores)[256]) const {
  const int64_t part = pairs * 32, next = parts * part;
  zero<0>();
  zero<2>();
  if constexpr (Both) zero<1>();
  if constexpr (Both) zero<3>();
  for (int64_t p = 0; p < (Resident ? 1 : parts); ++p) {
    if constexpr (!Resident) load_tile<6>(queries.data() + p * pairs * 2, stride * 2);
    if constexpr (!Resident && Both) load_tile<7>(queries.data() + 16 * stride + p * pairs * 2, stride * 2);
    load_tile<4>(tile + p * part, 64);
    load_tile<5>(tile + next + p * part, 64);
    accumulate<0, 6, 4>();
    if constexpr (Both) accumulate<1, 7, 4>();
    accumulate<2, 6, 5>();
    if constexpr (Both) accumulate<3, 7, 5>();
  }
  store_tile<0>(scores[0]);
  if constexpr (Both) store_tile<1>(scores[1]);
  store_tile<2>(scores[2]);
  if constexpr (Both) store_tile<3>(scores[3]);
}

// Best scores of every lane of every group. The maxima of one batch are taken while the next one is multiplied.
template <bool Resident, bool Both>
void Filter::all_groups(const uint16_t* tiles, int64_t rows, const float* bias, float* best) const {
  if constexpr (Resident) load_tile<6>(queries.data(), stride * 2);
  if constexpr (Resident && Both) load_tile<7>(queries.data() + 16 * stride, stride * 2);
  const int64_t tile_size = parts * pairs * 32, batches = groups * kLanes / kBatch;
  alignas(64) float scores[2][2 * kBatch][256];

  const auto maxima = [&](int64_t batch) {
    const float* adds = bias + batch * kBatch * kLanes;
    const bool first = batch % (kLanes / kBatch) == 0;
    for (int half = 0; half < (Both ? 2 : 1); ++half) {
      float* to = best + (half * 16 * groups + batch * kBatch / kLanes) * kLanes;
      const int64_t count = Both && half == 0 ? 16 : rows - half * 16;
      for (int64_t i = 0; i < count; ++i) {
        __m512 most = first ? _mm512_set1_ps(-kInfinity) : _mm512_loadu_ps(to + i * groups * kLanes);
#pragma GCC unroll 4
        for (int t = 0; t < kBatch; ++t) {
          const __m512 score = _mm512_load_ps(scores[batch % 2][2 * t + half] + i * kLanes);
          most = _mm512_max_ps(most, _mm512_add_ps(score, _mm512_loadu_ps(adds + t * kLanes)));
        }
        _mm512_storeu_ps(to + i * groups * kLanes, most);
      }
    }
  };
  for (int64_t batch = 0; batch < batches; ++batch) {
    for (int64_t t = 0; t < kBatch; t += 2)
      multiply<Resident, Both>(tiles + (batch * kBatch + t) * tile_size, scores[batch % 2] + 2 * t);
    if (batch > 0) maxima(batch - 1);
  }
  maxima(batches - 1);
}

void Filter::run(const float* q, int64_t q_stride, int64_t rows, const Codebook& book, const float* bias, float* best) {
  if (configured != rows) {
    TileConfig(rows, pairs).load();
    configured = rows;
  }
  round(q, q_stride, rows);
  if (parts == 1) {
    rows > 16 ? all_groups<true, true>(book.tiles, rows, bias, best)
              : all_groups<true, false>(book.tiles, rows, bias, best);
  } else {
    rows > 16 ? all_groups<false, true>(book.tiles, rows, bias, best)
              : all_groups<false, false>(book.tiles, rows, bias, best);
  }
}

} // namespace

const Kernels kernels = {"amx", true, search_rows, pack_codebook};

} // namespace kvb::amx
KVB_TARGET_END

#endif

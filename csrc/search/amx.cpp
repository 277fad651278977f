// The search with AMX: sixteen queries times sixteen keys times 64 coordinates in one instruction, on bytes.
#include "search.h"

#if defined(__x86_64__)

KVB_TARGET("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")
namespace kvb::amx {
namespace {

#define KVB_WIDTH 16
#include "vectors.inc"
#include "lanes512.inc"
#include "dot512.inc"
#include "search.inc"

// What the tile registers hold: 0 to 3 sums, 4 and 5 keys, 6 and 7 queries. The second sixteen queries use the odd
// sums and register 7.
struct alignas(64) TileConfig {
  TileConfig(int64_t queries, int64_t quads) {
    const int64_t first = std::min<int64_t>(queries, 16), second = std::max<int64_t>(queries - 16, 1);
    for (int tile : {0, 2}) set(tile, first, 64);
    for (int tile : {1, 3}) set(tile, second, 64);
    for (int tile : {4, 5}) set(tile, quads, 64);
    set(6, first, 4 * quads);
    set(7, second, 4 * quads);
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
inline void multiply() { // signed by unsigned
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

template <bool Each>
struct TileFilter : QuantizedQueries<Each> {
  using Base = QuantizedQueries<Each>;
  using Base::book, Base::bias, Base::start, Base::factor, Base::sets;
  static constexpr int64_t kRows = 32; // queries taken at once
  static constexpr int64_t kBatch = 4; // tiles of keys whose sums wait for their maximum together

  TileFilter(const PackedCodebook& book, const Biases& bias)
      : Base(book, bias, kRows),
        parts(book.layout.parts()),
        quads(book.layout.quads()),
        stride(whole_vectors(std::max(book.layout.depth() * 4, book.layout.D))),
        numbers(kRows * stride) {}

  ~TileFilter() {
    if (configured) asm volatile("tilerelease");
  }

  // Sums of all queries and two tiles of keys: sums[0] and [1] of the first tile, [2] and [3] of the second, the odd
  // ones of the second sixteen queries. Resident queries were loaded before.
  template <bool Resident, bool Both>
  void two_tiles(const uint8_t* tile, int32_t (*sums)[256]) const {
    constexpr int64_t next = kInterleaved * kTileRow;
    zero<0>();
    zero<2>();
    if constexpr (Both) zero<1>();
    if constexpr (Both) zero<3>();
    for (int64_t p = 0; p < (Resident ? 1 : parts); ++p) {
      if constexpr (!Resident) load_tile<6>(numbers.data() + p * quads * 4, stride);
      if constexpr (!Resident && Both) load_tile<7>(numbers.data() + 16 * stride + p * quads * 4, stride);
      load_tile<4>(tile + p * quads * next, next);
      load_tile<5>(tile + p * quads * next + kTileRow, next);
      multiply<0, 6, 4>();
      if constexpr (Both) multiply<1, 7, 4>();
      multiply<2, 6, 5>();
      if constexpr (Both) multiply<3, 7, 5>();
    }
    store_tile<0>(sums[0]);
    if constexpr (Both) store_tile<1>(sums[1]);
    store_tile<2>(sums[2]);
    if constexpr (Both) store_tile<3>(sums[3]);
  }

  // Best scores of every lane of every group, or all scores. Those of one batch are taken while the next one is
  // multiplied.
  template <bool Resident, bool Both>
  void all_groups(int64_t rows, float* best) const {
    if constexpr (Resident) load_tile<6>(numbers.data(), stride);
    if constexpr (Resident && Both) load_tile<7>(numbers.data() + 16 * stride, stride);
    const int64_t batches = book.layout.groups() * kLanes / kBatch;
    alignas(64) int32_t sums[2][2 * kBatch][256];

    const auto maxima = [&](int64_t batch) {
      const int64_t group = batch * kBatch / kLanes;
      const bool first = batch % (kLanes / kBatch) == 0;
      vec add[kBatch];
      for (int t = 0; t < kBatch; ++t) add[t] = load(bias.data + (batch * kBatch + t) * kLanes);
      for (int half = 0; half < (Both ? 2 : 1); ++half) {
        const int64_t count = Both && half == 0 ? 16 : rows - half * 16;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = half * 16 + i;
          float* to = best + (row * sets() + (Each ? batch * kBatch : group)) * kLanes;
          const ivec raise = start[row] - ivec{};
          const vec times = factor[row] - vec{};
          vec most = Each || first ? -kInfinity - vec{} : load(to);
          for (int t = 0; t < kBatch; ++t) {
            const ivec sum = *reinterpret_cast<const ivec*>(sums[batch % 2][2 * t + half] + i * kLanes);
            const vec score = reinterpret_cast<vec>(sum + raise) + add[t] * times;
            Each ? store(to + t * kLanes, score) : void(most = greater(most, score));
          }
          if constexpr (!Each) store(to, most);
        }
      }
    };
    for (int64_t batch = 0; batch < batches; ++batch) {
      for (int64_t t = 0; t < kBatch; t += 2)
        two_tiles<Resident, Both>(book.tiles + book.layout.tile(0, batch * kBatch + t), sums[batch % 2] + 2 * t);
      if (batch > 0) maxima(batch - 1);
    }
    maxima(batches - 1);
  }

  // Scores of ``rows`` centred queries, best[row][set][16].
  void run(const float* q, int64_t q_stride, const float* norms, int64_t rows, float* best) {
    if (configured != rows) {
      TileConfig(rows, quads).load();
      configured = rows;
    }
    this->quantize(q, q_stride, norms, rows, [&](int64_t i, int64_t d, ivec low_bytes) {
      store_bytes(numbers.data() + i * stride + d, low_bytes);
    });
    if (parts == 1) {
      rows > 16 ? all_groups<true, true>(rows, best) : all_groups<true, false>(rows, best);
    } else {
      rows > 16 ? all_groups<false, true>(rows, best) : all_groups<false, false>(rows, best);
    }
  }

  const int64_t parts, quads;
  const int64_t stride; // bytes from one query to the next
  Vector<int8_t> numbers;
  int64_t configured = 0; // rows
};

// Coordinates up to which vectors are faster: hardware tiles cost the same however little of them is used.
constexpr int64_t kNarrow = 24;

void search_tiles(const Search& search, int64_t codebook, int64_t begin, int64_t end) {
  const bool fits = search.packed && search.layout.tiled && search.layout.D > kNarrow;
  (!fits ? search_rows : keeps_each(search) ? search_with<TileFilter<true>> : search_with<TileFilter<false>>)(
      search, codebook, begin, end);
}

} // namespace

const Kernels kernels = {
    "amx", true, search_tiles, search_small, search_every, pack_codebook, fingerprint, add_finite};

} // namespace kvb::amx
KVB_TARGET_END

#endif

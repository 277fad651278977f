// nearest and lookup: checks, memory, and how the work is cut; the instruction set does the rest.
#include "../numbers.h"
#include "../ops.h"
#include "packing.h"
#include "positions.h"
#include "search.h"

#include <limits>

namespace kvb {
namespace {

// Packing a key takes as long as so many queries take to be compared with it as it lies, whatever its coordinates.
constexpr int64_t kFewQueries = 16;
// Up to so many queries, packing all codebooks at once costs a large part of the search: memory is new for each call.
constexpr int64_t kSomeQueries = 1024;
constexpr double kPackCoordinate = 0.7; // nanoseconds to pack a coordinate of a key
// Copying the mask of a pair takes about a nanosecond: this many pairs pay for another thread.
constexpr int64_t kMaskGrain = 1 << 15;

void require_search(const Tensor& queries, const Tensor& keys, const Tensor& packed, const std::optional<Tensor>& mask,
                    int64_t topk) {
  require_keys(keys);
  require_cpu(queries, "queries");
  const int64_t C = keys.size(0), K = keys.size(1), D = keys.size(2);
  require(is_floating(queries.scalar_type()), "expected floating-point queries");
  require(queries.dim() == 4 && queries.size(2) == C && queries.size(3) == D, "expected queries [B, S, ", C, ", ", D,
          "] for keys ", shape(keys), ", got ", shape(queries));
  if (!is_unpacked(packed, C)) require_packed(packed, layout_of(keys), C);
  if (mask) {
    require_cpu(*mask, "mask");
    require(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == C &&
                mask->size(1) == K,
            "expected mask torch.bool [", C, ", ", K, "], got ", dtype_name(mask->scalar_type()), " ", shape(*mask));
  }
  require(topk >= 1 && topk <= K, "expected topk between 1 and ", K, ", got ", topk);
}

// The bits and biases of a search without the pairs that a mask bars.
struct Masked {
  Masked(const bool* allowed, const Layout& layout, const char* packed, int64_t C)
      : bits(C * layout.blocks()), bias(C * Biases::count(layout) * kLanes) {
    parallel(C, std::max<int64_t>(1, kMaskGrain / layout.K), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const char* book = packed + c * layout.nbytes();
        const Biases unmasked(layout, book);
        uint16_t* bit = bits.data() + c * layout.blocks();
        float* score = bias.data() + c * Biases::count(layout) * kLanes;
        std::memcpy(bit, book + layout.bits(), 2 * layout.blocks());
        for (int64_t i = 0; i < Biases::count(layout); ++i)
          std::memcpy(score + i * kLanes, unmasked.data + i * unmasked.step, 4 * kLanes);
        for (int64_t k = 0; k < layout.K; ++k) {
          if (allowed[c * layout.K + k]) continue;
          bit[k / kLanes] &= static_cast<uint16_t>(~(1u << (k % kLanes)));
          score[Biases::place(layout, k)] = -std::numeric_limits<float>::infinity();
        }
      }
    });
  }

  Vector<uint16_t> bits;
  Vector<float> bias;
};

// Memory for packed keys.
struct alignas(kAlignment) Line {
  char bytes[kAlignment];
};

bool in_float64(const Tensor& queries, const Tensor& keys) {
  return queries.scalar_type() == ScalarType::Double || keys.scalar_type() == ScalarType::Double;
}

// Whether threads that take whole codebooks finish at about the same time: less than a fifth of them waits.
bool shares_codebooks(int64_t C) {
  const int64_t threads = torch::stable::get_num_threads(), turns = (C + threads - 1) / threads;
  return 5 * C > 4 * turns * threads;
}

// Packs each codebook into the same memory, and searches it before the next one; ``cost`` is what one query takes.
void pack_in_turn(Search all, const Tensor& keys, double cost, SearchRows search_rows) {
  const BookPacking packing(keys);
  const double pack = kPackCoordinate * all.layout.K * all.layout.D;
  parallel(all.C, thread_grain(pack + cost * all.B * all.S), [&](int64_t begin, int64_t end) {
    BookPacking::Scratch scratch = packing.scratch();
    const Buffer<Line> book = new_buffer<Line>(all.layout.nbytes() / kAlignment);
    Search search = all;
    search.packed = book.get()->bytes;
    search.packed_step = 0;
    for (int64_t c = begin; c < end; ++c) {
      packing.pack(c, scratch, book.get()->bytes);
      search_rows(search, c, 0, search.B * search.S);
    }
  });
}

// The search of arguments that fit: writes [B, S, C, topk] of each, distances in float64 where ``in_float64``.
void search_all(const Tensor& queries_, const Tensor& keys_, Tensor packed, const std::optional<Tensor>& mask,
                int64_t topk, int64_t* indices, void* distances, bool wants_distances) {
  const Tensor queries = queries_.stride(3) == 1 || queries_.size(3) == 1 ? queries_ : compact(queries_);
  const Tensor keys = compact(keys_);
  const Layout layout = layout_of(keys);
  const int64_t B = queries.size(0), S = queries.size(1), C = queries.size(2), N = B * S;
  const bool float64 = in_float64(queries, keys), small = is_small(layout, topk) && !float64;
  const bool unpacked = is_unpacked(packed, C);
  const Keys come = !unpacked ? Keys::kPacked : N <= kFewQueries ? Keys::kAsTheyLie : Keys::kPackedForIt;
  const bool every = measures_every(layout, N, topk, float64, come);
  const bool directly = unpacked && (every || come == Keys::kAsTheyLie);
  const bool in_turn = unpacked && !directly && !mask && N <= kSomeQueries && shares_codebooks(C);
  if (unpacked && !directly && !in_turn) packed = pack_keys(keys);
  const char* const from = directly ? nullptr : static_cast<const char*>(packed.const_data_ptr());
  std::optional<Tensor> allowed;
  if (mask) allowed = compact(*mask);
  const bool* const some = allowed ? static_cast<const bool*>(allowed->const_data_ptr()) : nullptr;
  std::optional<Masked> masked;
  if (some && !directly && !every) masked.emplace(some, layout, from, C);
  std::atomic<bool> stale = false;
  Search search = {
      .queries = queries.const_data_ptr(),
      .queries_type = queries.scalar_type(),
      .B = B,
      .S = S,
      .C = C,
      .stride_b = queries.stride(0),
      .stride_s = queries.stride(1),
      .stride_c = queries.stride(2),
      .keys = keys.const_data_ptr(),
      .keys_type = keys.scalar_type(),
      .float64 = float64,
      .mask = some,
      .layout = layout,
      .packed = from,
      .packed_step = layout.nbytes(),
      .masked_bits = masked ? masked->bits.data() : nullptr,
      .masked_bias = masked ? masked->bias.data() : nullptr,
      .topk = topk,
      .stale = &stale,
      .indices = indices,
      .distances = distances,
      .wants_distances = wants_distances,
  };
  const double cost = every      ? cost_every(layout, N, topk, float64)
                      : directly ? cost_directly(layout, topk)
                      : small    ? cost_small(layout, topk)
                                 : cost_filtered(layout, topk);
  const SearchRows search_rows = every                ? kernels().search_every
                                 : small && !directly ? kernels().search_small
                                                      : kernels().search;
  if (in_turn)
    pack_in_turn(search, keys, cost, search_rows);
  else
    over_positions(N, C, layout.D, cost, [&](int64_t c, int64_t begin, int64_t end) {
      search_rows(search, c, begin, end);
    });
  require(
      !stale, "packed keys do not fit the keys, which have changed since; pack the keys again with pack_keys(keys)");
}

} // namespace

std::tuple<Tensor, Tensor> nearest(
    Tensor queries, Tensor keys, Tensor packed, std::optional<Tensor> mask, int64_t topk) {
  packed = found_packed(keys, packed);
  require_search(queries, keys, packed, mask, topk);
  const int64_t B = queries.size(0), S = queries.size(1), C = queries.size(2);
  Tensor indices = new_tensor(queries, {B, S, C, topk}, ScalarType::Long);
  Tensor distances = new_tensor(
      queries, {B, S, C, topk}, in_float64(queries, keys) ? ScalarType::Double : ScalarType::Float);
  search_all(
      queries, keys, packed, mask, topk, indices.mutable_data_ptr<int64_t>(), distances.mutable_data_ptr(), true);
  return {indices, distances};
}

std::tuple<Tensor, Tensor> lookup(
    Tensor queries, Tensor keys, Tensor packed, Tensor values, std::optional<Tensor> mask, std::string pool) {
  packed = found_packed(keys, packed);
  require_search(queries, keys, packed, mask, 1);
  Tensor indices =
      new_tensor(queries, {queries.size(0), queries.size(1), queries.size(2)}, ScalarType::Long);
  const Buffer<double> distances = new_buffer<double>(indices.numel());
  search_all(queries, keys, packed, mask, 1, indices.mutable_data_ptr<int64_t>(), distances.get(), false);
  return {gather(values, indices, pool, "bscv"), indices};
}

std::string cpu_capability() {
  return kernels().name;
}

} // namespace kvb

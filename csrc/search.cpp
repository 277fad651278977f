// pack_keys, nearest and lookup: checks, memory, and how the work is cut; the instruction set does the rest.
#include "ops.h"
#include "packing.h"
#include "search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace kvb {
namespace {

constexpr int64_t kChunkBytes = 1 << 20; // of queries that pass through all codebooks before the next ones do,
constexpr int64_t kChunk = 1024; // and the least positions that pay for bringing in the keys of a codebook
constexpr int64_t kUnit = 64; // positions of one piece of work
constexpr double kWorthAThread = 4e6; // multiplications that pay for waking another thread
constexpr double kAround = 8e3; // multiplications that take as long as all else that a query needs

// Tiles pay from a few coordinates on; their sums could overflow beyond some thousands.
Layout layout_of(int64_t K, int64_t D, bool wide) {
  return {K, D, wide, !wide && kernels().tiles && D > 4 && D <= 4096};
}

Layout layout_of(const Tensor& keys) {
  return layout_of(keys.size(1), keys.size(2), keys.scalar_type() == ScalarType::Double);
}

void require_keys(const Tensor& keys) {
  require_cpu(keys, "keys");
  require(is_floating(keys.scalar_type()), "expected floating-point keys");
  require(keys.dim() == 3, "expected keys [C, K, D], got ", shape(keys));
}

void require_packed(const Tensor& packed, const Layout& layout, int64_t C) {
  require_cpu(packed, "packed");
  const std::string id = layout.id();
  if (packed.scalar_type() == ScalarType::Byte && packed.dim() == 2 && packed.size(0) == C &&
      packed.size(1) == layout.nbytes() && packed.is_contiguous() &&
      std::memcmp(packed.const_data_ptr(), id.data(), kPart) == 0)
    return;
  require(
      false, "packed keys do not match: expected the layout '", id.substr(0, id.find_last_not_of(' ') + 1), "', ",
      layout.nbytes(), " bytes for each of ", C, " codebooks, got ", shape(packed),
      "; pack the keys again with pack_keys(keys)");
}

void require_search(const Tensor& queries, const Tensor& keys, const Tensor& packed, const std::optional<Tensor>& mask,
                    int64_t topk) {
  require_keys(keys);
  require_cpu(queries, "queries");
  const int64_t C = keys.size(0), K = keys.size(1), D = keys.size(2);
  require(is_floating(queries.scalar_type()), "expected floating-point queries");
  require(queries.dim() == 4 && queries.size(2) == C && queries.size(3) == D, "expected queries [B, S, ", C, ", ", D,
          "] for keys ", shape(keys), ", got ", shape(queries));
  require_packed(packed, layout_of(keys), C);
  if (mask) {
    require(mask->is_cpu() && mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == C &&
                mask->size(1) == K,
            "expected mask torch.bool [", C, ", ", K, "] on the CPU, got ", shape(*mask));
  }
  require(topk >= 1 && topk <= K, "expected topk between 1 and ", K, ", got ", topk);
}

// The bits and biases of a search without the pairs that a mask bars.
struct Masked {
  Masked(const Tensor& mask_, const Layout& layout, const char* packed, int64_t C)
      : bits(C * layout.blocks()), bias(C * Biases::count(layout) * kLanes) {
    const Tensor mask = compact(mask_);
    const bool* allowed = static_cast<const bool*>(mask.const_data_ptr());
    parallel(C, std::max<int64_t>(1, 32768 / layout.K), [&](int64_t begin, int64_t end) {
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

  std::vector<uint16_t> bits;
  std::vector<float> bias;
};

// Run work(codebook, begin, end) over all positions of all codebooks: a chunk of positions goes through every codebook,
// so that outputs are still in cache when the next codebook writes beside them.
template <class F>
void over_positions(int64_t N, int64_t C, int64_t D, double cost, const F& work) {
  if (N == 0 || C == 0) return;
  const int64_t chunk = std::min(N, std::max(kChunkBytes / (4 * C * D) / kUnit * kUnit, kChunk));
  const int64_t unit = std::min(chunk, kUnit);
  const int64_t per_book = (chunk + unit - 1) / unit, chunks = (N + chunk - 1) / chunk;
  const int64_t grain = static_cast<int64_t>(kWorthAThread / (cost * unit + 1)) + 1;
  parallel(chunks * C * per_book, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      // Neighbouring units of one codebook are one piece of work: its keys are set up once.
      const int64_t book = begin / per_book, last = std::min(end, (book + 1) * per_book);
      const int64_t first_position = book / C * chunk;
      const int64_t from = first_position + begin % per_book * unit;
      const int64_t to = std::min({first_position + chunk, N, first_position + (last - book * per_book) * unit});
      if (from < to) work(book % C, from, to);
      begin = last;
    }
  });
}

// Float64 on either side: every key by direct difference, in float64.
template <class Q, class Key>
void nearest_wide(const Q* queries, const Key* keys, const bool* mask, const Layout& layout, const Tensor& shape_of,
                  int64_t topk, int64_t* indices, double* distances) {
  const int64_t S = shape_of.size(1), C = shape_of.size(2), K = layout.K, D = layout.D;
  const int64_t strides[] = {shape_of.stride(0), shape_of.stride(1), shape_of.stride(2)};
  over_positions(shape_of.size(0) * S, C, D, static_cast<double>(K) * D * 8, [&](int64_t c, int64_t begin, int64_t end) {
    std::vector<double> q(D), apart(D);
    std::vector<std::pair<double, int64_t>> near;
    std::vector<char> usable(K);
    for (int64_t k = 0; k < K; ++k) {
      const Key* key = keys + (c * K + k) * D;
      usable[k] = !mask || mask[c * K + k];
      for (int64_t d = 0; d < D; ++d) usable[k] = usable[k] && std::isfinite(static_cast<double>(key[d]));
    }
    for (int64_t row = begin; row < end; ++row) {
      const Q* from = queries + row / S * strides[0] + row % S * strides[1] + c * strides[2];
      bool finite = true;
      for (int64_t d = 0; d < D; ++d) {
        q[d] = static_cast<double>(from[d]);
        finite = finite && std::isfinite(q[d]);
      }
      int64_t* index = indices + (row * C + c) * topk;
      double* distance = distances + (row * C + c) * topk;
      near.clear();
      for (int64_t k = 0; finite && k < K; ++k) {
        if (!usable[k]) continue;
        const Key* key = keys + (c * K + k) * D;
        for (int64_t d = 0; d < D; ++d) {
          const double difference = q[d] - static_cast<double>(key[d]);
          apart[d] = difference * difference;
        }
        // Halving, as in the reference: one order of summation everywhere.
        for (int64_t size = D; size > 1; size = size / 2 + size % 2) {
          const int64_t half = size / 2;
          for (int64_t d = 0; d < half; ++d) apart[d] += apart[half + d];
          if (size % 2) apart[half] = apart[size - 1];
        }
        near.emplace_back(apart[0], k);
      }
      const int64_t found = std::min<int64_t>(near.size(), topk);
      std::partial_sort(near.begin(), near.begin() + found, near.end());
      for (int64_t t = 0; t < found; ++t) {
        index[t] = near[t].second;
        distance[t] = near[t].first;
      }
      fill_unused(index, found, topk);
      const double nothing = finite ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
      std::fill(distance + found, distance + topk, nothing);
    }
  });
}

} // namespace

Packing::Packing(const Tensor& keys)
    : keys_(keys),
      layout_(layout_of(keys)),
      id_(layout_.id()),
      packed_(torch::stable::new_empty(keys, {keys.size(0), layout_.nbytes()}, ScalarType::Byte)) {}

void Packing::pack(int64_t c, std::vector<float>& rows) const {
  const int64_t size = layout_.K * layout_.D;
  char* book = static_cast<char*>(packed_.mutable_data_ptr()) + c * layout_.nbytes();
  std::memset(book, 0, layout_.nbytes());
  std::memcpy(book, id_.data(), kPart);
  if (layout_.wide) return;
  if (keys_.scalar_type() == ScalarType::Float) {
    kernels().pack(layout_, static_cast<const float*>(keys_.const_data_ptr()) + c * size, book);
    return;
  }
  rows.resize(size);
  with_floating(keys_.scalar_type(), [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(keys_.const_data_ptr()) + c * size;
    std::transform(from, from + size, rows.begin(), widen<float, decltype(type)>);
  });
  kernels().pack(layout_, rows.data(), book);
}

Tensor pack_keys(Tensor keys) {
  require_keys(keys);
  const Packing packing(compact(keys));
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, keys.size(1) * keys.size(2)));
  parallel(keys.size(0), grain, [&](int64_t begin, int64_t end) {
    std::vector<float> rows;
    for (int64_t c = begin; c < end; ++c) packing.pack(c, rows);
  });
  return packing.packed();
}

namespace {

bool is_wide(const Tensor& queries, const Tensor& keys) {
  return queries.scalar_type() == ScalarType::Double || keys.scalar_type() == ScalarType::Double;
}

// The search of arguments that fit: writes [B, S, C, topk] of each, distances in float64 where ``is_wide``.
void search_all(const Tensor& queries_, const Tensor& keys_, const Tensor& packed, const std::optional<Tensor>& mask,
                int64_t topk, int64_t* indices, void* distances) {
  const Tensor queries = queries_.stride(3) == 1 || queries_.size(3) == 1 ? queries_ : compact(queries_);
  const Tensor keys = compact(keys_);
  const Layout layout = layout_of(keys);
  const int64_t B = queries.size(0), S = queries.size(1), C = queries.size(2);

  if (is_wide(queries, keys)) {
    std::optional<Tensor> allowed;
    if (mask) allowed = compact(*mask);
    const bool* may = allowed ? static_cast<const bool*>(allowed->const_data_ptr()) : nullptr;
    with_floating(queries.scalar_type(), [&](auto q) {
      with_floating(keys.scalar_type(), [&](auto k) {
        nearest_wide(static_cast<const decltype(q)*>(queries.const_data_ptr()),
                     static_cast<const decltype(k)*>(keys.const_data_ptr()), may, layout, queries, topk, indices,
                     static_cast<double*>(distances));
      });
    });
    return;
  }

  const char* from = static_cast<const char*>(packed.const_data_ptr());
  std::unique_ptr<Masked> masked;
  if (mask) masked = std::make_unique<Masked>(*mask, layout, from, C);
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
      .layout = layout,
      .packed = from,
      .masked_bits = masked ? masked->bits.data() : nullptr,
      .masked_bias = masked ? masked->bias.data() : nullptr,
      .topk = topk,
      .indices = indices,
      .distances = static_cast<float*>(distances),
  };
  const double cost = static_cast<double>(layout.K) * layout.D + kAround;
  over_positions(B * S, C, layout.D, cost, [&](int64_t c, int64_t begin, int64_t end) {
    kernels().search(search, c, begin, end);
  });
}

} // namespace

std::tuple<Tensor, Tensor> nearest(
    Tensor queries, Tensor keys, Tensor packed, std::optional<Tensor> mask, int64_t topk) {
  require_search(queries, keys, packed, mask, topk);
  const int64_t B = queries.size(0), S = queries.size(1), C = queries.size(2);
  Tensor indices = torch::stable::new_empty(queries, {B, S, C, topk}, ScalarType::Long);
  Tensor distances = torch::stable::new_empty(
      queries, {B, S, C, topk}, is_wide(queries, keys) ? ScalarType::Double : ScalarType::Float);
  search_all(
      queries, keys, packed, mask, topk, indices.mutable_data_ptr<int64_t>(), distances.mutable_data_ptr());
  return {indices, distances};
}

std::tuple<Tensor, Tensor> lookup(
    Tensor queries, Tensor keys, Tensor packed, Tensor values, std::optional<Tensor> mask, std::string pool) {
  require_search(queries, keys, packed, mask, 1);
  Tensor indices =
      torch::stable::new_empty(queries, {queries.size(0), queries.size(1), queries.size(2)}, ScalarType::Long);
  const std::unique_ptr<double[]> distances(new double[indices.numel()]); // that nobody asked for
  search_all(queries, keys, packed, mask, 1, indices.mutable_data_ptr<int64_t>(), distances.get());
  return {gather(values, indices, pool, "bscv"), indices};
}

std::string cpu_capability() {
  return kernels().name;
}

int64_t cpu_packed_nbytes(int64_t K, int64_t D, bool wide) {
  return layout_of(K, D, wide).nbytes();
}

} // namespace kvb

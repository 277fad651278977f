// One step of the moving averages of keys, with dead pairs replaced: update_keys_. A codebook is packed by the thread
// that moved it, while its keys are in cache.
#include "../numbers.h"
#include "../ops.h"
#include "../search/packing.h"
#include "rows.h"

namespace kvb {
namespace {

// What is the same for every pair.
struct Rule {
  double keep; // the share of the old averages
  double eps, threshold, start;
  bool rescale_all; // divide the averages of pairs without a hit, too
};

// One codebook: K pairs of D coordinates.
template <class T>
struct Averages {
  using Sum = Accumulator<T>;
  T *keys, *averages, *sizes;
  const Sum *hits, *sums;
  const T* spare; // rows for dead pairs
  int64_t usable; // how many of them, or none
  int64_t K, D;
};

// The same as torch.lerp: ``from`` at weight 0 and ``to`` at weight 1, to the last bit.
template <class Sum>
inline Sum mix(Sum from, Sum to, Sum weight) {
  return weight < Sum{0.5} ? from + weight * (to - from) : to - (to - from) * (1 - weight);
}

template <class T>
void update(const Averages<T>& book, const Rule& rule) {
  using Sum = Accumulator<T>;
  const Sum keep = static_cast<Sum>(rule.keep);
  const auto size_of = [&](int64_t k) { return mix(book.hits[k], widen<Sum>(book.sizes[k]), keep); };
  double total = 0;
  for (int64_t k = 0; k < book.K; ++k) total += size_of(k);
  const double share = total / (total + book.K * rule.eps);
  int64_t replaced = 0;
  for (int64_t k = 0; k < book.K; ++k) {
    T *const key = book.keys + k * book.D, *const average = book.averages + k * book.D;
    const Sum size = size_of(k), *const sum = book.sums + k * book.D;
    if (book.usable > 0 && size < rule.threshold) {
      const T* const row = book.spare + replaced++ % book.usable * book.D;
      for (int64_t d = 0; d < book.D; ++d) {
        key[d] = row[d];
        average[d] = static_cast<T>(widen<Sum>(row[d]) * static_cast<Sum>(rule.start));
      }
      book.sizes[k] = static_cast<T>(static_cast<Sum>(rule.start));
    } else if (rule.rescale_all || book.hits[k] > 0) {
      const Sum smoothed = static_cast<Sum>((size + rule.eps) * share);
      for (int64_t d = 0; d < book.D; ++d) {
        const Sum mean = mix(sum[d], widen<Sum>(average[d]), keep);
        average[d] = static_cast<T>(mean);
        key[d] = static_cast<T>(mean / smoothed);
      }
      book.sizes[k] = static_cast<T>(size);
    } else {
      for (int64_t d = 0; d < book.D; ++d) average[d] = static_cast<T>(mix(sum[d], widen<Sum>(average[d]), keep));
      book.sizes[k] = static_cast<T>(size);
    }
  }
}

void require_like(const Tensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
  require_cpu(tensor, name);
  require_shape(tensor, name, sizes);
  require(
      tensor.scalar_type() == type && tensor.is_contiguous(), "expected contiguous ", name, " ", dtype_name(type),
      ", got ", dtype_name(tensor.scalar_type()), tensor.is_contiguous() ? "" : " with other strides");
}

void require_spare(const Tensor& spare, const Tensor& usable, ScalarType type, int64_t C, int64_t D) {
  require_like(spare, "spare", type, {C, -1, D});
  require_like(usable, "usable", ScalarType::Long, {C});
  require(spare.size(1) > 0, "expected at least one spare row for each codebook");
  const int64_t* const most = usable.const_data_ptr<int64_t>();
  require(
      std::all_of(most, most + C, [&](int64_t some) { return some >= 0 && some <= spare.size(1); }),
      "expected usable between 0 and the ", spare.size(1), " spare rows");
}

// What is written shares no memory with what is read, nor with anything else that is written.
void require_all_apart(const Tensor& keys, const Tensor& keys_avg, const Tensor& cluster_size,
                       std::initializer_list<std::pair<const Tensor*, const char*>> read) {
  const std::pair<const Tensor*, const char*> written[] = {
      {&keys, "keys"}, {&keys_avg, "keys_avg"}, {&cluster_size, "cluster_size"}};
  for (const auto& [tensor, name] : written) {
    for (const auto& [other, other_name] : written)
      if (other != tensor) require_apart(*tensor, name, *other, other_name);
    for (const auto& [other, other_name] : read)
      if (other) require_apart(*tensor, name, *other, other_name);
  }
}

} // namespace

Tensor update_keys_(
    Tensor keys, Tensor keys_avg, Tensor cluster_size, Tensor hits, Tensor sums, std::optional<Tensor> spare,
    std::optional<Tensor> usable, double decay, double eps, double threshold, double start, bool rescale_all) {
  const ScalarType type = keys.scalar_type();
  require_keys(keys);
  require_like(keys, "keys", type, {-1, -1, -1});
  const int64_t C = keys.size(0), K = keys.size(1), D = keys.size(2);
  require_like(keys_avg, "keys_avg", type, {C, K, D});
  require_like(cluster_size, "cluster_size", type, {C, K});
  const ScalarType exact = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  require_like(hits, "hits", exact, {C, K});
  require_like(sums, "sums", exact, {C, K, D});
  require(spare.has_value() == usable.has_value(), "expected spare rows and how many are usable, or neither");
  if (spare) require_spare(*spare, *usable, type, C, D);
  require_all_apart(keys, keys_avg, cluster_size,
                    {{&hits, "hits"}, {&sums, "sums"}, {spare ? &*spare : nullptr, "spare"},
                     {usable ? &*usable : nullptr, "usable"}});

  // All memory is taken before anything is written: a step that fails moves no key.
  const Packing packing(keys);
  const int64_t grain = packing_grain(K, D);
  const int64_t shares = std::clamp<int64_t>((C + grain - 1) / grain, 1, torch::stable::get_num_threads());
  std::vector<Packing::Scratch> scratch;
  for (int64_t share = 0; share < shares; ++share) scratch.push_back(packing.scratch());
  with_floating(type, [&](auto key) {
    using T = decltype(key);
    using Sum = Accumulator<T>;
    const Sum* const hit = hits.const_data_ptr<Sum>();
    const bool any = std::any_of(hit, hit + C * K, [](Sum count) { return count > 0; });
    const Rule rule{any ? decay : 1.0, eps, threshold, start, rescale_all && any};
    const auto move = [&](int64_t c) {
      update<T>(
          {
              .keys = keys.mutable_data_ptr<T>() + c * K * D,
              .averages = keys_avg.mutable_data_ptr<T>() + c * K * D,
              .sizes = cluster_size.mutable_data_ptr<T>() + c * K,
              .hits = hit + c * K,
              .sums = sums.const_data_ptr<Sum>() + c * K * D,
              .spare = spare ? spare->const_data_ptr<T>() + c * spare->size(1) * D : nullptr,
              .usable = spare ? usable->const_data_ptr<int64_t>()[c] : 0,
              .K = K,
              .D = D,
          },
          rule);
    };
    parallel(shares, 1, [&](int64_t begin, int64_t end) {
      for (int64_t share = begin; share < end; ++share) {
        for (int64_t c = share * C / shares; c < (share + 1) * C / shares; ++c) {
          move(c);
          packing.pack(c, scratch[share]);
        }
      }
    });
  });
  return packing.packed();
}

} // namespace kvb

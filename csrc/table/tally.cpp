// Class histograms in the rows of a table that indices name: tally_.
#include "../ops.h"
#include "rows.h"

namespace kvb {
namespace {

template <class F>
void with_counter(ScalarType type, const F& work) {
  switch (type) {
    case ScalarType::Int: return work(int32_t{});
    case ScalarType::Long: return work(int64_t{});
    case ScalarType::Float: return work(float{});
    default: return work(double{});
  }
}

bool is_counter(ScalarType type) {
  return type == ScalarType::Int || type == ScalarType::Long || type == ScalarType::Float ||
      type == ScalarType::Double;
}

// Integers wrap around, where C++ would leave a signed overflow undefined.
template <class Count>
inline Count moved(Count count, Count weight, bool remove) {
  if constexpr (std::is_integral_v<Count>) {
    using Bits = std::make_unsigned_t<Count>;
    const Bits bits = static_cast<Bits>(weight);
    return static_cast<Count>(static_cast<Bits>(count) + (remove ? Bits{0} - bits : bits));
  } else {
    return remove ? count - weight : count + weight;
  }
}

template <class Count>
struct Tally {
  const Tensor& indices; // [B, S, C]
  const int64_t* targets; // [B]
  const Count* weights; // [B, S, C], by their strides
  Sizes weight_stride;
  int64_t K, V;
  bool remove;
  Count* counts; // [C, K, V]

  // Count in the rows of one range; the lowest counter that a removal leaves there, or that was known before.
  template <class Index>
  Count in(const RowRange& range, Count lowest) const {
    visit<Index>(range, [&](Count& count, Count weight) { count = moved(count, weight, remove); });
    if (remove) visit<Index>(range, [&](Count& count, Count) { lowest = std::min(lowest, count); });
    return lowest;
  }

 private:
  // The counters of one range that indices name, in batch order: visit(counter, weight).
  template <class Index, class F>
  void visit(const RowRange& range, const F& with) const {
    const int64_t B = indices.size(0), first = range.first / K, last = (range.last - 1) / K + 1;
    const uint64_t rows = range.rows();
    // The longer of the last two axes inside: for one row, positions come in their order either way.
    const bool books_inside = last - first > indices.size(1);
    const int64_t outer = books_inside ? indices.size(1) : last - first;
    const int64_t inner = books_inside ? last - first : indices.size(1);
    const int outer_axis = books_inside ? 1 : 2, inner_axis = books_inside ? 2 : 1;
    const int64_t code_step = indices.stride(inner_axis), weight_step = weight_stride[inner_axis];
    const int64_t outer_row = books_inside ? 0 : K, inner_row = books_inside ? K : 0;
    const Index* codes = indices.const_data_ptr<Index>() + first * indices.stride(2);
    const Count* weight = weights + first * weight_stride[2];
    Count* const table = counts + range.first * V;
    for (int64_t b = 0; b < B; ++b) {
      Count* const column = table + targets[b];
      for (int64_t o = 0; o < outer; ++o) {
        const Index* code = codes + b * indices.stride(0) + o * indices.stride(outer_axis);
        const Count* one = weight + b * weight_stride[0] + o * weight_stride[outer_axis];
        int64_t origin = first * K - range.first + o * outer_row;
        for (int64_t i = 0; i < inner; ++i, code += code_step, one += weight_step, origin += inner_row) {
          const int64_t row = origin + static_cast<int64_t>(*code);
          if (static_cast<uint64_t>(row) >= rows) continue;
          with(column[row * V], *one);
        }
      }
    }
  }
};

template <class Count>
void tally(
    const Tensor& counts, const Tensor& indices, const Tensor& targets, const std::optional<Tensor>& weights,
    bool remove, Count* lowest) {
  const int64_t C = counts.size(0), K = counts.size(1), V = counts.size(2);
  *lowest = 0;
  if (indices.numel() == 0) return;
  const Count one = 1;
  const Tally<Count> all{
      indices,
      targets.const_data_ptr<int64_t>(),
      weights ? weights->template const_data_ptr<Count>() : &one,
      weights ? Sizes{weights->stride(0), weights->stride(1), weights->stride(2)} : Sizes{},
      K,
      V,
      remove,
      counts.template mutable_data_ptr<Count>()};
  const Shares shares = share_out(C, K, kCachedBytes / (V * static_cast<int64_t>(sizeof(Count))), indices.numel());
  Vector<Count> found(shares.size(), std::numeric_limits<Count>::max());
  with_integer(indices.scalar_type(), [&](auto index) {
    for_shares(shares, [&](int64_t t) {
      Count least = found[t];
      for (const RowRange& range : shares[t]) least = all.template in<decltype(index)>(range, least);
      found[t] = least;
    });
  });
  if (remove) *lowest = *std::min_element(found.begin(), found.end());
}

} // namespace

Tensor tally_(Tensor counts, Tensor indices, Tensor targets, std::optional<Tensor> weights, bool remove) {
  require_cpu(counts, "counts");
  require_cpu(targets, "targets");
  const ScalarType type = counts.scalar_type();
  require(is_counter(type), "expected counts int32, int64, float32 or float64, got ", dtype_name(type));
  require_shape(counts, "counts", {-1, -1, -1});
  require(counts.is_contiguous(), "expected contiguous counts");
  require_apart(counts, "counts", indices, "indices");
  require_apart(counts, "counts", targets, "targets");
  require_codes(indices, counts.size(0), counts.size(1));
  const int64_t B = indices.size(0), S = indices.size(1), C = indices.size(2);
  require_shape(targets, "targets", {B});
  require(
      targets.scalar_type() == ScalarType::Long, "expected targets torch.int64, got ",
      dtype_name(targets.scalar_type()));
  if (weights) {
    require_cpu(*weights, "weights");
    require_apart(counts, "counts", *weights, "weights");
    require_shape(*weights, "weights", {B, S, C});
    require(
        weights->scalar_type() == type, "expected weights ", dtype_name(type), " as counts, got ",
        dtype_name(weights->scalar_type()));
  }
  targets = compact(targets);
  require_classes(targets, counts.size(2));
  Tensor lowest = new_tensor(counts, {}, type);
  with_counter(type, [&](auto count) {
    using Count = decltype(count);
    tally(counts, indices, targets, weights, remove, lowest.mutable_data_ptr<Count>());
  });
  return lowest;
}

} // namespace kvb

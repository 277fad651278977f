// lookup for samples of any number of positions, or of one without an axis for it.
#include "../ops.h"

namespace kvb {
namespace {

using Axes = std::array<int64_t, 4>;

// The same memory in the first axes of ``sizes``.
Tensor seen_as(const Tensor& tensor, int64_t axes, const Axes& sizes, const Axes& strides) {
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), axes, sizes.data(), strides.data(), /*further in=*/0, &view));
  return Tensor(view);
}

Tensor without_positions(const Tensor& tensor) {
  Axes sizes, strides;
  int64_t axes = 0;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    if (axis == 1) continue;
    sizes[axes] = tensor.size(axis);
    strides[axes++] = tensor.stride(axis);
  }
  return seen_as(tensor, axes, sizes, strides);
}

} // namespace

std::tuple<Tensor, Tensor> lookup_positions(
    Tensor queries, Tensor keys, Tensor packed, Tensor values, std::optional<Tensor> mask, std::string pool) {
  if (queries.dim() != 3) return lookup(queries, keys, packed, values, mask, pool);
  queries = seen_as(
      queries, 4, {queries.size(0), 1, queries.size(1), queries.size(2)},
      {queries.stride(0), queries.stride(0), queries.stride(1), queries.stride(2)});
  const auto [out, indices] = lookup(queries, keys, packed, values, mask, pool);
  return {without_positions(out), without_positions(indices)};
}

} // namespace kvb

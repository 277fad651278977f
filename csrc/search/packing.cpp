// pack_keys: keys in the layout that the search reads, one codebook after the other.
#include "packing.h"

#include "../ops.h"
#include "search.h"

#include <cstring>

namespace kvb {
namespace {

// Tiles pay once more than one quadruple of coordinates is multiplied. Beyond some thousands of coordinates little is
// left of the 33000 that filter_int8.inc shares out.
constexpr int64_t kTiledMin = 5, kTiledMax = 4096;

Layout layout_of(int64_t K, int64_t D, bool float64) {
  return {K, D, float64, !float64 && kernels().tiles && D >= kTiledMin && D <= kTiledMax};
}

} // namespace

Layout layout_of(const Tensor& keys) {
  return layout_of(keys.size(1), keys.size(2), keys.scalar_type() == ScalarType::Double);
}

void require_keys(const Tensor& keys) {
  require_cpu(keys, "keys");
  require(is_floating(keys.scalar_type()), "expected floating-point keys");
  require(keys.dim() == 3 && keys.numel() > 0, "expected keys [C, K, D], none of them 0, got ", shape(keys));
}

void require_packed(const Tensor& packed, const Layout& layout, int64_t C) {
  require_cpu(packed, "packed");
  const std::string id = layout.id();
  if (packed.scalar_type() == ScalarType::Byte && packed.dim() == 2 && packed.size(0) == C &&
      packed.size(1) == layout.nbytes() && packed.is_contiguous() &&
      std::memcmp(packed.const_data_ptr(), id.data(), kAlignment) == 0)
    return;
  require(
      false, "packed keys do not match: expected the layout '", id.substr(0, id.find_last_not_of(' ') + 1), "', ",
      layout.nbytes(), " bytes for each of ", C, " codebooks, got ", shape(packed),
      "; pack the keys again with pack_keys(keys)");
}

Packing::Packing(const Tensor& keys)
    : keys_(keys),
      layout_(layout_of(keys)),
      id_(layout_.id()),
      packed_(new_tensor(keys, {keys.size(0), layout_.nbytes()}, ScalarType::Byte)) {}

void Packing::pack(int64_t c, Vector<float>& rows) const {
  const int64_t size = layout_.K * layout_.D;
  char* book = static_cast<char*>(packed_.mutable_data_ptr()) + c * layout_.nbytes();
  std::memset(book, 0, layout_.nbytes());
  std::memcpy(book, id_.data(), kAlignment);
  if (layout_.float64) return;
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
  parallel(keys.size(0), packing_grain(keys.size(1), keys.size(2)), [&](int64_t begin, int64_t end) {
    Vector<float> rows;
    for (int64_t c = begin; c < end; ++c) packing.pack(c, rows);
  });
  return packing.packed();
}

int64_t cpu_packed_nbytes(int64_t K, int64_t D, bool float64) {
  return layout_of(K, D, float64).nbytes();
}

} // namespace kvb

// pack_keys: keys in the layout that the search reads, one codebook after the other; packed_matches: whether they are
// still the same.
#include "packing.h"

#include "../ops.h"
#include "search.h"

#include <array>
#include <atomic>
#include <cstring>

namespace kvb {
namespace {

// Tiles pay from a whole quadruple of coordinates on. Beyond some thousands of coordinates little is
// left of the 33000 that filter_int8.inc shares out.
constexpr int64_t kTiledMin = 4, kTiledMax = 4096;

Layout layout_of(int64_t K, int64_t D, bool float64) {
  return {K, D, float64, kernels().tiles && D >= kTiledMin && D <= kTiledMax};
}

// Whether ``packed`` has the layout of C codebooks.
bool is_packed(const Tensor& packed, const Layout& layout, int64_t C) {
  const std::string id = layout.id();
  return packed.scalar_type() == ScalarType::Byte && packed.dim() == 2 && packed.size(0) == C &&
      packed.size(1) == layout.nbytes() && packed.is_contiguous() &&
      std::memcmp(packed.const_data_ptr(), id.data(), kAlignment) == 0;
}

// A fingerprint of codebook ``c`` of contiguous keys.
uint64_t fingerprint(const Tensor& keys, int64_t c) {
  const int64_t size = element_bytes(keys.scalar_type()), bytes = keys.size(1) * keys.size(2) * size;
  const uint64_t signs = size == 2 ? 0x8000800080008000 : size == 4 ? 0x8000000080000000 : 0x8000000000000000;
  return kernels().fingerprint(static_cast<const char*>(keys.const_data_ptr()) + c * bytes, bytes, signs);
}

constexpr int64_t kFingerprintBytes = 1 << 18; // that pay for another thread: some 15 us of work

} // namespace

Layout layout_of(const Tensor& keys) {
  return layout_of(keys.size(1), keys.size(2), keys.scalar_type() == ScalarType::Double);
}

void require_keys(const Tensor& keys) {
  require_cpu(keys, "keys");
  require(is_floating(keys.scalar_type()), "expected floating-point keys");
  require(keys.dim() == 3 && keys.numel() > 0, "expected keys [C, K, D], none of them 0, got ", shape(keys));
}

bool is_unpacked(const Tensor& packed, int64_t C) {
  return packed.scalar_type() == ScalarType::Byte && packed.dim() == 2 && packed.size(0) == C && packed.size(1) == 0;
}

void require_packed(const Tensor& packed, const Layout& layout, int64_t C) {
  require_cpu(packed, "packed");
  if (is_packed(packed, layout, C)) return;
  const std::string id = layout.id();
  require(
      false, "packed keys do not match: expected the layout '", id.substr(0, id.find_last_not_of(' ') + 1), "', ",
      layout.nbytes(), " bytes for each of ", C, " codebooks, got ", dtype_name(packed.scalar_type()), " ",
      shape(packed), "; pack the keys again with pack_keys(keys)");
}

Tensor found_packed(const Tensor& keys, const Tensor& packed) {
  if (packed.scalar_type() != ScalarType::Long) return packed;
  std::array<StableIValue, 2> stack{torch::stable::detail::from(keys), torch::stable::detail::from(packed)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("kvb::kept_packed", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

BookPacking::BookPacking(const Tensor& keys) : keys_(keys), layout_(layout_of(keys)), id_(layout_.id()) {}

BookPacking::Scratch BookPacking::scratch() const {
  const bool widened = element_bytes(keys_.scalar_type()) == 2;
  return {Vector<float>(widened ? layout_.K * layout_.D : 0), Vector<double>(layout_.D)};
}

void BookPacking::pack(int64_t c, Scratch& scratch, char* book) const {
  const int64_t size = layout_.K * layout_.D;
  std::memset(book, 0, layout_.nbytes());
  std::memcpy(book, id_.data(), kAlignment);
  // First, so that a write while the keys are packed leaves a mark that no longer fits them.
  const uint64_t mark = fingerprint(keys_, c);
  std::memcpy(book + layout_.mark(), &mark, sizeof(mark));
  if (scratch.rows.empty()) {
    const char* keys = static_cast<const char*>(keys_.const_data_ptr()) + c * size * element_bytes(keys_.scalar_type());
    return kernels().pack(layout_, keys, scratch.totals.data(), book);
  }
  with_floating(keys_.scalar_type(), [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(keys_.const_data_ptr()) + c * size;
    std::transform(from, from + size, scratch.rows.begin(), widen<float, decltype(type)>);
  });
  kernels().pack(layout_, scratch.rows.data(), scratch.totals.data(), book);
}

Packing::Packing(const Tensor& keys)
    : books_(keys), packed_(new_tensor(keys, {keys.size(0), layout_of(keys).nbytes()}, ScalarType::Byte)) {}

void Packing::pack(int64_t c, Scratch& scratch) const {
  books_.pack(c, scratch, static_cast<char*>(packed_.mutable_data_ptr()) + c * packed_.size(1));
}

Tensor pack_keys(Tensor keys) {
  require_keys(keys);
  const Packing packing(compact(keys));
  parallel(keys.size(0), packing_grain(keys.size(1), keys.size(2)), [&](int64_t begin, int64_t end) {
    Packing::Scratch scratch = packing.scratch();
    for (int64_t c = begin; c < end; ++c) packing.pack(c, scratch);
  });
  return packing.packed();
}

Tensor packed_matches(Tensor keys, Tensor packed) {
  require_keys(keys);
  require_cpu(packed, "packed");
  keys = compact(keys);
  const Layout layout = layout_of(keys);
  const int64_t C = keys.size(0);
  std::atomic<bool> matches = is_packed(packed, layout, C);
  if (matches) {
    const char* const marks = static_cast<const char*>(packed.const_data_ptr()) + layout.mark();
    const int64_t bytes = layout.K * layout.D * element_bytes(keys.scalar_type());
    parallel(C, kFingerprintBytes / bytes + 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end && matches; ++c) {
        const uint64_t mark = fingerprint(keys, c);
        if (std::memcmp(marks + c * layout.nbytes(), &mark, sizeof(mark)) != 0) matches = false;
      }
    });
  }
  Tensor out = new_tensor(keys, {}, ScalarType::Bool);
  *out.mutable_data_ptr<bool>() = matches;
  return out;
}

int64_t cpu_packed_nbytes(int64_t K, int64_t D, bool float64) {
  return layout_of(K, D, float64).nbytes();
}

} // namespace kvb

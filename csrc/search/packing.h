// Packing keys one codebook at a time, by whoever has just changed it: pack_keys and update_keys_.
#pragma once

#include "packed.h"

#include <string>

namespace kvb {

constexpr int64_t kPackingWork = 1 << 16; // coordinates whose packing pays for another thread: some 50 us of work

// How many codebooks of ``K`` keys each thread packs at least.
inline int64_t packing_grain(int64_t K, int64_t D) {
  return std::max<int64_t>(1, kPackingWork / std::max<int64_t>(1, K * D));
}

Layout layout_of(const Tensor& keys);
void require_keys(const Tensor& keys);

// The packed keys that ``packed`` stands for: itself, or what kvb/ops/kept.py has for these keys.
Tensor found_packed(const Tensor& keys, const Tensor& packed);
// Whether ``packed`` stands for keys that were not packed: it has no bytes for each codebook.
bool is_unpacked(const Tensor& packed, int64_t C);
void require_packed(const Tensor& packed, const Layout& layout, int64_t C);

// Packs codebooks of contiguous keys [C, K, D], one at a time, wherever it is told to.
class BookPacking {
 public:
  explicit BookPacking(const Tensor& keys);

  // What a thread needs to pack one codebook after the other.
  struct Scratch {
    Vector<float> rows; // [K, D], where keys are of 16 bits
    Vector<double> totals; // [D]
  };
  Scratch scratch() const;

  // Pack the keys of codebook ``c`` as they are now; takes no memory.
  void pack(int64_t c, Scratch& scratch, char* book) const;

 private:
  Tensor keys_;
  Layout layout_;
  std::string id_;
};

// The packed keys of such a tensor: memory for all codebooks, each written when asked.
class Packing {
 public:
  explicit Packing(const Tensor& keys);

  using Scratch = BookPacking::Scratch;
  Scratch scratch() const {
    return books_.scratch();
  }
  void pack(int64_t c, Scratch& scratch) const;

  const Tensor& packed() const {
    return packed_;
  }

 private:
  BookPacking books_;
  Tensor packed_;
};

} // namespace kvb

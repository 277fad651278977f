// Packing keys one codebook at a time, by whoever has just changed it: pack_keys and update_keys_.
#pragma once

#include "packed.h"

#include <string>
#include <vector>

namespace kvb {

// The packed keys of one tensor of contiguous keys [C, K, D]: memory for all codebooks, each written when asked.
class Packing {
 public:
  explicit Packing(const Tensor& keys);

  // Pack the keys of codebook ``c`` as they are now; ``rows`` is memory that a thread keeps between codebooks.
  void pack(int64_t c, std::vector<float>& rows) const;

  const Tensor& packed() const {
    return packed_;
  }

 private:
  Tensor keys_;
  Layout layout_;
  std::string id_;
  Tensor packed_;
};

} // namespace kvb

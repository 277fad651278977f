// What the search hands to the code of one instruction set, and all headers that this code needs: none may be included
// between KVB_TARGET and its end.
#pragma once

#include "../numbers.h"
#include "float64.h"
#include "packed.h"
#include "small.h"
#include "target.h"

#include <atomic>
#include <bit>
#include <cmath>
#include <functional>
#include <tuple>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace kvb {

struct Search {
  const void* queries; // [B, S, C, D], last axis contiguous
  ScalarType queries_type;
  int64_t B, S, C;
  int64_t stride_b, stride_s, stride_c; // in elements
  const void* keys; // [C, K, D] contiguous
  ScalarType keys_type;
  bool float64; // queries or keys are: then distances are
  const bool* mask; // null, or [C, K]: which keys may be found
  Layout layout;
  const char* packed; // of the first codebook, or of the only one at hand; null for keys that are read as they lie
  int64_t packed_step; // bytes from one codebook to the next
  const uint16_t* masked_bits; // null, or [C, blocks]: the packed ones without the masked pairs
  const float* masked_bias; // null, or [C, Biases::count, 16], likewise
  int64_t topk;
  std::atomic<bool>* stale; // set where the packed keys do not fit the keys
  int64_t* indices; // [B, S, C, T]
  void* distances; // [B, S, C, T], double or float
  bool wants_distances; // else they are memory that nobody reads

  const char* packed_book(int64_t codebook) const {
    return packed + codebook * packed_step;
  }
  // Where the results of a row begin.
  int64_t result_offset(int64_t row, int64_t codebook) const {
    return (row * C + codebook) * topk;
  }
  void put(int64_t offset, int64_t key, double distance) const {
    indices[offset] = key;
    put(offset, distance);
  }
  void put(int64_t offset, double distance) const {
    if (float64)
      static_cast<double*>(distances)[offset] = distance;
    else
      static_cast<float*>(distances)[offset] = static_cast<float>(distance);
  }
};

// Searches rows [begin, end) of the B*S positions in one codebook.
using SearchRows = void (*)(const Search& search, int64_t codebook, int64_t begin, int64_t end);
// Packs one codebook of keys, rows of float64 or float32 as the layout says, but for its id and fingerprint; ``totals``
// [D] is scratch memory.
using PackCodebook = void (*)(const Layout& layout, const void* keys, double* totals, char* packed);
// A fingerprint of bytes, whatever the instruction set, that takes -0 for +0 where ``signs`` has the sign bits of the
// numbers in a word.
using Fingerprint = uint64_t (*)(const char* data, int64_t bytes, uint64_t signs);
// Adds each listed row of ``data`` to its sum and counts it, unless it holds NaN or Inf; ``far`` says whether rows come
// from beyond the L2 cache.
using AddFinite =
    void (*)(const float* data, const Row* rows, int64_t listed, int64_t width, bool far, int64_t* hits, double* sums);

struct Kernels {
  const char* name;
  bool tiles; // packs 8-bit tiles and multiplies them
  SearchRows search;
  SearchRows search_small; // in a codebook that is_small
  SearchRows search_every; // where the search measures_every key
  PackCodebook pack;
  Fingerprint fingerprint;
  AddFinite add_finite;
};

// The kernels of this machine, chosen once (capability.cpp).
const Kernels& kernels();

namespace portable {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx_vnni {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_vnni {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
namespace neon_dot {
extern const Kernels kernels;
}
#endif

// Fill what is left of the nearest keys of a query, from ``found`` on, with the lowest keys not among them.
inline void fill_unused(int64_t* indices, int64_t found, int64_t topk) {
  if (found == topk) return;
  Vector<char> used(topk); // of the keys below ``topk``: what is missing is among them
  for (int64_t t = 0; t < found; ++t)
    if (indices[t] < topk) used[indices[t]] = true;
  for (int64_t unused = 0; found < topk; ++unused)
    if (!used[unused]) indices[found++] = unused;
}

} // namespace kvb

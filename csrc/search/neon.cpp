// The search with NEON, which every 64-bit Arm processor has.
#include "search.h"

#if defined(__aarch64__)

namespace kvb::neon {
namespace {

#define KVB_WIDTH 4
#define KVB_REGISTERS 32
#include "vectors.inc"
#include "lanes128.inc"
#include "search.inc"

} // namespace

const Kernels kernels = {
    "neon", false, search_rows, search_small, search_every, pack_codebook, fingerprint, add_finite};

} // namespace kvb::neon

#endif

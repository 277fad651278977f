// The search with AVX2 and FMA.
#include "search.h"

#if defined(__x86_64__)

KVB_TARGET("avx2,fma,f16c")
namespace kvb::avx2 {
namespace {

#define KVB_WIDTH 8
#include "vectors.inc"
#include "lanes256.inc"
#include "search.inc"

} // namespace

const Kernels kernels = {
    "avx2", false, search_rows, search_small, search_every, pack_codebook, fingerprint, add_finite};

} // namespace kvb::avx2
KVB_TARGET_END

#endif

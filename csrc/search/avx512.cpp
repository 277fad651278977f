// The search with AVX-512.
#include "search.h"

#if defined(__x86_64__)

KVB_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace kvb::avx512 {
namespace {

#define KVB_WIDTH 16
#include "vectors.inc"
#include "lanes512.inc"
#include "search.inc"

} // namespace

const Kernels kernels = {
    "avx512", false, search_rows, search_small, search_every, pack_codebook, fingerprint, add_finite};

} // namespace kvb::avx512
KVB_TARGET_END

#endif

// The search with AVX-512 and its products of bytes.
#include "search.h"

#if defined(__x86_64__)

KVB_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")
namespace kvb::avx512_vnni {
namespace {

#define KVB_WIDTH 16
#include "vectors.inc"
#include "lanes512.inc"
#include "dot512.inc"
#include "search.inc"

} // namespace

const Kernels kernels = {
    "avx512_vnni", true, search_rows, search_small, search_every, pack_codebook, fingerprint, add_finite};

} // namespace kvb::avx512_vnni
KVB_TARGET_END

#endif

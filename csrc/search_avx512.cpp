// The search with AVX-512.
#include "search.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <functional>
#include <vector>

#include "target.h"

KVB_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace kvb::avx512 {
namespace {

#include "lanes512.h"

#define KVB_WIDTH 16
#define KVB_HALVED 0
#include "search_impl.inc"

} // namespace

const Kernels kernels = {"avx512", false, search_rows, pack_codebook};

} // namespace kvb::avx512
KVB_TARGET_END

#endif

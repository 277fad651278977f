// The search with AVX2 and FMA.
#include "search.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#include "target.h"

KVB_TARGET("avx2,fma")
namespace kvb::avx2 {
namespace {

#define KVB_WIDTH 8
#include "vectors.inc"
#include "lanes256.inc"
#include "search_impl.inc"

} // namespace

const Kernels kernels = {"avx2", false, search_with<FloatFilter>, pack_codebook, add_finite};

} // namespace kvb::avx2
KVB_TARGET_END

#endif

// The search with AVX-512 and its products of bytes.
#include "search.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#include "target.h"

KVB_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")
namespace kvb::avx512_vnni {
namespace {

#define KVB_WIDTH 16
#include "vectors.inc"
#include "lanes512.inc"
#include "dot512.inc"
#include "search_impl.inc"

void search_rows(const Search& search, int64_t codebook, int64_t begin, int64_t end) {
  (search.layout.tiled ? search_with<Int8Filter> : search_with<FloatFilter>)(search, codebook, begin, end);
}

} // namespace

const Kernels kernels = {"avx512_vnni", true, search_rows, pack_codebook, add_finite};

} // namespace kvb::avx512_vnni
KVB_TARGET_END

#endif

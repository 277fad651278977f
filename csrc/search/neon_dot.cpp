// The search with NEON and its products of bytes.
#include "search.h"

#if defined(__aarch64__)

KVB_TARGET("arch=armv8.2-a+dotprod")
namespace kvb::neon_dot {
namespace {

#define KVB_WIDTH 4
#define KVB_REGISTERS 32
#include "vectors.inc"
#include "lanes128.inc"

// Products take their second factor from any lane of a register.
template <int lane>
struct Lane {
  int8x16_t numbers;
};

template <int i>
inline Lane<i % kWidth> spread(const int32_t* queries) {
  return {reinterpret_cast<int8x16_t>(*reinterpret_cast<const ivec_at*>(queries + i / kWidth * kWidth))};
}

template <int lane>
inline ivec dot(ivec sum, ivec keys, Lane<lane> query) {
  return vdotq_laneq_s32(sum, reinterpret_cast<int8x16_t>(keys), query.numbers, lane);
}

inline void store_bytes(int8_t* to, ivec values) {
  const int16x4_t halves = vmovn_s32(values);
  const int32_t four = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(halves, halves))), 0);
  std::memcpy(to, &four, sizeof(four));
}
#define KVB_DOT
#include "search.inc"

} // namespace

const Kernels kernels = {
    "neon_dot", true, search_rows, search_small, search_every, pack_codebook, fingerprint, add_finite};

} // namespace kvb::neon_dot
KVB_TARGET_END

#endif

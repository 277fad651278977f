// Numbers of every dtype: finding their C++ type, widening them, and fetching rows of them.
#pragma once

#include "common.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <type_traits>

namespace kvb {

constexpr int64_t kLine = 64; // bytes of a cache line

// The type sums are kept in.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Bool: return "torch.bool";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    default: return torch::headeronly::toString(type);
  }
}

// A product that is rounded before it is added to something: some processors would do both at once.
template <class T>
inline T rounded(T product) {
#if defined(__aarch64__)
  asm("" : "+w"(product));
#elif defined(__FMA__)
  asm("" : "+x"(product));
#endif
  return product;
}

// Call ``work`` with a value of the C++ type that holds ``type``.
template <class F>
void with_floating(ScalarType type, const F& work) {
  switch (type) {
    case ScalarType::Half: return work(torch::headeronly::Half{});
    case ScalarType::BFloat16: return work(torch::headeronly::BFloat16{});
    case ScalarType::Float: return work(float{});
    default: return work(double{});
  }
}

template <class F>
void with_integer(ScalarType type, const F& work) {
  switch (type) {
    case ScalarType::Byte: return work(uint8_t{});
    case ScalarType::Char: return work(int8_t{});
    case ScalarType::Short: return work(int16_t{});
    case ScalarType::Int: return work(int32_t{});
    default: return work(int64_t{});
  }
}

inline int64_t element_bytes(ScalarType type) {
  int64_t bytes = 0;
  const auto measure = [&](auto value) { bytes = sizeof(value); };
  is_floating(type) ? with_floating(type, measure) : with_integer(type, measure);
  return bytes;
}

// ``value`` as a sum's type; exact.
template <class Sum, class T>
inline Sum widen(T value) {
  return static_cast<Sum>(value);
}

// Without branches, so that it vectorises, and without float32 subnormals, which the user may have set to flush.
template <>
inline float widen<float, torch::headeronly::Half>(torch::headeronly::Half value) {
  constexpr int32_t rebias = (127 - 15) << 23;
  const int32_t magnitude = value.x & 0x7fff;
  const int32_t is_small = -(magnitude < 0x400), is_infinite_or_nan = -(magnitude >= 0x7c00);
  const int32_t normal = (magnitude << 13) + rebias + (is_infinite_or_nan & rebias);
  const int32_t subnormal = std::bit_cast<int32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  const int32_t sign = static_cast<int32_t>(static_cast<uint32_t>(value.x & 0x8000) << 16);
  return std::bit_cast<float>(sign | (is_small & subnormal) | (~is_small & normal));
}

// One fetched row: where it stands in the tensor that goes with the indices, and in the table.
struct Row {
  int64_t place;
  int64_t target;
};

constexpr int64_t kAhead = 12; // rows between a fetch and its use

// Rows between a fetch into the L2 cache and its use.
inline int64_t far_ahead(int64_t row_bytes) {
  constexpr int64_t kBytes = 1 << 14, kRows = 128; // what arrives from memory meanwhile; at most so many rows
  return std::clamp<int64_t>(kBytes / row_bytes, 2 * kAhead, kRows);
}

// Fetch every cache line of a row; the last byte, because counting lines from the address mispredicts. Where ``level``
// is 2, into the L2 cache only, which waits for more lines at a time than the L1 cache does.
template <int level = 1>
inline void prefetch(const void* row, int64_t bytes) {
  const char* const begin = static_cast<const char*>(row);
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(begin + at, 0, 4 - level);
  __builtin_prefetch(begin + std::max<int64_t>(bytes, 1) - 1, 0, 4 - level);
  asm volatile(""); // else GCC sees a function without effects, and drops calls of it
}

} // namespace kvb

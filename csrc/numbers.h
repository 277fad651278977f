// Reading float16, bfloat16, float32 and float64 rows as float or double.
#pragma once

#include "common.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

namespace kvb {

// Calls ``work`` with a null pointer of the C++ type behind a floating-point dtype.
template <class F>
inline decltype(auto) with_type(ScalarType type, const F& work) {
  switch (type) {
    case ScalarType::Half:
      return work(static_cast<torch::headeronly::Half*>(nullptr));
    case ScalarType::BFloat16:
      return work(static_cast<torch::headeronly::BFloat16*>(nullptr));
    case ScalarType::Double:
      return work(static_cast<double*>(nullptr));
    default:
      return work(static_cast<float*>(nullptr));
  }
}

template <class T>
inline void read_row(const T* from, int64_t size, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = static_cast<float>(from[i]);
}

// Round to nearest even, as bits; the input is finite.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

} // namespace kvb

// What every operator shares: tensors of the stable ABI, last-resort checks, threads.
//
// Letters: B batch, S positions, C codebooks, K pairs per codebook, D key dim, V value dim, T nearest keys.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace kvb {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// RuntimeError in Python, without the path of the source file that the library's own macro would add.
template <class... Parts>
inline void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// For messages: a shape that is written only when its message is.
struct Shape {
  const Tensor& of;
};

inline Shape shape(const Tensor& tensor) {
  return {tensor};
}

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << "[";
  for (int64_t i = 0; i < shape.of.dim(); ++i) out << (i ? ", " : "") << shape.of.size(i);
  return out << "]";
}

inline Tensor compact(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); // a microsecond, even to do nothing
}

inline void require_cpu(const Tensor& tensor, const char* name) {
  require(tensor.is_cpu(), "expected ", name, " on the CPU");
}

inline void require_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (int64_t size : sizes) {
    fits = fits && (size < 0 || tensor.size(axis) == size);
    ++axis;
  }
  if (fits) return;
  std::ostringstream want;
  const char* comma = "";
  for (int64_t size : sizes) {
    want << comma;
    size < 0 ? want << "*" : want << size;
    comma = ", ";
  }
  require(false, "expected ", name, " [", want.str(), "], got ", shape(tensor));
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
      type == ScalarType::BFloat16;
}

// Work on [0, total) in PyTorch's own thread pool; ranges smaller than ``grain`` stay on the calling thread.
template <class F>
inline void parallel(int64_t total, int64_t grain, const F& work) {
  if (total > 0) torch::stable::parallel_for(0, total, std::max<int64_t>(grain, 1), work);
}

} // namespace kvb

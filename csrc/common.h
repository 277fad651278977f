// What every operator shares: tensors of the stable ABI, last-resort checks, threads.
//
// Letters: B batch, S positions, C codebooks, K pairs per codebook, D key dim, V value dim, T nearest keys.
#pragma once

// Bounds on rounding, NaN and Inf decide which keys are looked at: no compiler may pretend that they do not exist.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || defined(__ASSOCIATIVE_MATH__)
#error "kvb cannot be compiled with -ffast-math: add -fno-fast-math after your flags"
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

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

// --- memory ----------------------------------------------------------------------------------------------------------

[[noreturn]] inline void out_of_memory(double bytes) {
  std::ostringstream message;
  message << std::fixed << "not enough memory: " << bytes << " bytes cannot be allocated";
  std::string text = message.str();
  text.erase(text.find(".000000"), 7);
  throw std::runtime_error(text);
}

// What the vectors below take their memory from: it says how much was asked for.
template <class T>
struct Allocator {
  using value_type = T;
  static constexpr bool kAligned = alignof(T) > __STDCPP_DEFAULT_NEW_ALIGNMENT__;
  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}

  T* allocate(size_t count) {
    const double bytes = static_cast<double>(count) * sizeof(T);
    void* memory = nullptr;
    if constexpr (kAligned)
      memory = bytes < 0x1p62 ? ::operator new(count * sizeof(T), std::align_val_t{alignof(T)}, std::nothrow) : nullptr;
    else
      memory = bytes < 0x1p62 ? ::operator new(count * sizeof(T), std::nothrow) : nullptr;
    if (!memory) out_of_memory(bytes);
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) {
    if constexpr (kAligned)
      ::operator delete(memory, std::align_val_t{alignof(T)});
    else
      ::operator delete(memory);
  }
  template <class U>
  bool operator==(const Allocator<U>&) const {
    return true;
  }
};

template <class T>
using Vector = std::vector<T, Allocator<T>>;

// Memory that starts with undefined contents, for what is mostly never used.
template <class T>
struct Free {
  void operator()(T* memory) const {
    Allocator<T>().deallocate(memory, 0);
  }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free<T>>;

template <class T>
Buffer<T> new_buffer(int64_t count) {
  return Buffer<T>(Allocator<T>().allocate(static_cast<size_t>(count)));
}

constexpr size_t kMostAxes = 4; // of a new tensor

// A new tensor with undefined contents. torch::stable::new_empty would look up an operator by its name first, which
// takes longer than all else that a small call does.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  std::array<int64_t, kMostAxes> strides;
  int64_t elements = 1;
  for (size_t axis = sizes.size(); axis-- > 0; elements *= std::max<int64_t>(sizes.begin()[axis], 1))
    strides[axis] = elements;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle created = nullptr;
  const bool failed = aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), static_cast<int32_t>(type), device, 0,
      &created);
  if (!failed) return Tensor(created);
  double bytes = aoti_torch_dtype_element_size(static_cast<int32_t>(type));
  for (int64_t size : sizes) bytes *= static_cast<double>(size);
  out_of_memory(bytes);
}

inline Tensor compact(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor; // a call would take a microsecond, even to do nothing
  try {
    return torch::stable::contiguous(tensor);
  } catch (const std::exception&) {
    out_of_memory(static_cast<double>(tensor.numel()) * tensor.element_size());
  }
}

// --- last-resort checks ----------------------------------------------------------------------------------------------

// The first byte of a tensor and the one after its last; nothing for an empty one.
struct Extent {
  explicit Extent(const Tensor& tensor) {
    if (tensor.numel() == 0) return;
    int64_t elements = 1;
    for (int64_t axis = 0; axis < tensor.dim(); ++axis) elements += (tensor.size(axis) - 1) * tensor.stride(axis);
    bytes = elements * static_cast<int64_t>(tensor.element_size());
    begin = static_cast<const char*>(tensor.const_data_ptr());
  }
  bool overlaps(const Extent& other) const {
    return begin < other.begin + other.bytes && other.begin < begin + bytes;
  }

  const char* begin = nullptr;
  int64_t bytes = 0;
};

// A tensor on the CPU with memory for all of it: a storage may have been resized below what its tensors span.
inline void require_cpu(const Tensor& tensor, const char* name) {
  require(tensor.is_cpu(), "expected ", name, " on the CPU");
  const int64_t bytes = Extent(tensor).bytes;
  if (bytes == 0) return;
  int64_t held = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &held));
  const int64_t needed = tensor.storage_offset() * static_cast<int64_t>(tensor.element_size()) + bytes;
  require(held >= needed, "expected ", name, " with memory for ", needed, " bytes, got a storage of ", held,
          " bytes: it was resized");
}

// An operator that writes ``written`` while it reads ``read`` must not change what it still reads.
inline void require_apart(
    const Tensor& written, const char* written_name, const Tensor& read, const char* read_name) {
  require(!Extent(written).overlaps(Extent(read)), "expected ", read_name, " that share no memory with the ",
          written_name, " written in place; clone() them first");
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

// Work on [0, total) in PyTorch's own thread pool; ranges smaller than ``grain`` stay on the calling thread. What a
// thread throws is thrown here: PyTorch's C interface would replace its message.
template <class F>
inline void parallel(int64_t total, int64_t grain, const F& work) {
  if (total <= 0) return;
  std::mutex mutex;
  std::exception_ptr failed;
  torch::stable::parallel_for(0, total, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    try {
      work(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      failed = std::current_exception();
    }
  });
  if (failed) std::rethrow_exception(failed);
}

} // namespace kvb

// Rows added to the sums of whole codebooks, without a look at which of them a thread has to sum.
#pragma once

#include "pointers.h"

namespace kvb {

// The elements from the rows of one position to those of the next; none where steps differ.
inline std::optional<int64_t> position_step(const Source& source) {
  const Tensor& tensor = source.tensor;
  const int64_t B = tensor.size(0), S = tensor.size(1);
  if (tensor.stride(tensor.dim() - 1) != 1) return std::nullopt;
  if (S == 1) return tensor.stride(0);
  if (B == 1 || tensor.stride(0) == S * tensor.stride(1)) return tensor.stride(1);
  return std::nullopt;
}

// Adds rows that are ``step`` apart to the sums of codebooks ``first`` to ``last``; whether all indices are in [0, K).
template <class T>
[[nodiscard]] bool add_codebooks(
    const Source& source, int64_t step, int64_t first, int64_t last, Accumulator<T>* sums) {
  using Sum = Accumulator<T>;
  const int64_t books = last - first, width = source.width(), K = source.K;
  Walk part = codebooks(walk(source.indices, {}, K * width, width), first, last);
  part.table_origin = 0;
  const int64_t positions = part.size[0] * part.size[1];
  const int64_t tile = std::max<int64_t>(1, kListedRows / std::max(books, source.divisor != 1 ? width / 4 : 1));
  const bool fetch = books * K * width * static_cast<int64_t>(sizeof(Sum)) > kTableBytes;
  const bool in_order = step == books * source.codebook_step(); // the machine itself fetches such rows from its caches
  const bool far = source.beyond(in_order ? kSharedBytes : kTableBytes);
  Pointers<Sum> pointers(with_long_runs(part), K, sums, 0, positions * books, tile * books);
  const int64_t most = std::min(tile, positions);
  const Buffer<Sum*> to = new_buffer<Sum*>(most * books);
  const Buffer<Sum> shares = new_buffer<Sum>(source.divisor != 1 ? most * width : 0);
  const T* data = source.tensor.template const_data_ptr<T>() + first * source.codebook_step();
  for (int64_t n = 0; n < positions; n += tile, data += tile * step) {
    const int64_t count = std::min(tile, positions - n);
    if (!pointers.list(count * books, to.get())) return false;
    if (source.divisor == 1) {
      table_kernels().of<T>().add_to(data, step, source.codebook_step(), count, books, width, far, fetch, to.get());
      continue;
    }
    const int64_t together = step == width ? count : 1; // rows that follow each other
    for (int64_t i = 0; i < count; i += together)
      table_kernels().of<T>().widen_all(data + i * step, together * width, source.divisor, shares.get() + i * width);
    table_kernels().of<Sum>().add_to(shares.get(), width, 0, count, books, width, false, fetch, to.get());
  }
  return true;
}

} // namespace kvb

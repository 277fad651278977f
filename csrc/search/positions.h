// How the work of a search is cut: positions of a codebook in pieces, codebooks in turn, threads in PyTorch's pool.
#pragma once

#include "../common.h"

namespace kvb {

// A chunk of queries passes through all codebooks before the next one does: as much as a core's L2 cache holds, ...
constexpr int64_t kChunkBytes = 1 << 20;
// ... but at least this many positions, or bringing in the keys of a codebook costs more than searching them.
constexpr int64_t kChunkPositions = 1024;
// Positions of one piece of work: a few times the rows that a filter takes at once; as many as all distances are taken
// of at once where there are fewer pieces than some for each thread.
constexpr int64_t kPiece = 64, kLeastPiece = 8, kPieces = 4;
constexpr double kThreadWork = 3e4; // nanoseconds of work that pay for waking another thread: several times a wake-up

// How many pieces of work each thread takes at least, if one takes so many nanoseconds.
inline int64_t thread_grain(double nanoseconds) {
  return static_cast<int64_t>(kThreadWork / (nanoseconds + 1)) + 1;
}

// Run work(codebook, begin, end) over N positions of C codebooks, so that outputs are still in cache when the next
// codebook writes next to them; ``cost`` is what one query takes, in nanoseconds.
template <class F>
void over_positions(int64_t N, int64_t C, int64_t D, double cost, const F& work) {
  if (N == 0 || C == 0) return;
  const int64_t chunk = std::min(N, std::max(kChunkBytes / (4 * C * D) / kPiece * kPiece, kChunkPositions));
  const int64_t share = N * C / (kPieces * torch::stable::get_num_threads()) / kLeastPiece * kLeastPiece;
  const int64_t piece = std::min(chunk, std::clamp(share, kLeastPiece, kPiece));
  const int64_t per_book = (chunk + piece - 1) / piece, chunks = (N + chunk - 1) / chunk;
  parallel(chunks * C * per_book, thread_grain(cost * piece), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      // Neighbouring pieces of one codebook are searched together: its keys are set up once.
      const int64_t book = begin / per_book, last = std::min(end, (book + 1) * per_book);
      const int64_t first_position = book / C * chunk;
      const int64_t from = first_position + begin % per_book * piece;
      const int64_t to = std::min({first_position + chunk, N, first_position + (last - book * per_book) * piece});
      if (from < to) work(book % C, from, to);
      begin = last;
    }
  });
}

} // namespace kvb

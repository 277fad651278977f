// The best of K * K pairs of half keys, without their K * K scores: product_nearest.
#include "../ops.h"
#include "best.h"

#include <atomic>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace kvb {
namespace {

constexpr int64_t kHeldScores = 1 << 18; // half scores of a tile: 1 MB, so that they stay in an L2 cache
constexpr int64_t kFewestRows = 16; // of a tile: products of fewer rows are slow
constexpr int64_t kMostHalves = 1 << 16; // keys of a half, so that 32 bits number all pairs

struct Pair {
  int64_t first, second; // ranks among the best of each half
};

// The ranks that can be among the ``topk`` best sums: (i + 1) * (j + 1) - 1 pairs are no worse than (i, j).
std::vector<Pair> pairs_of_ranks(int64_t ranks, int64_t topk) {
  std::vector<Pair> pairs;
  for (int64_t i = 0; i < ranks; ++i)
    for (int64_t j = 0; j < ranks && (i + 1) * (j + 1) <= topk; ++j) pairs.push_back({i, j});
  return pairs;
}

// What rounding took from first + second.
template <class Sum>
Sum lost(Sum first, Sum second) {
  const Sum sum = first + second, of_second = sum - first;
  const Sum error = (first - (sum - of_second)) + (second - of_second);
  return error == error ? error : Sum{0};
}

// One thread's work on rows of half scores.
template <class T>
class Finder {
  using Sum = Accumulator<T>;

 public:
  Finder(int64_t K, int64_t topk, const std::vector<Pair>& pairs)
      : K_(K),
        topk_(topk),
        ranks_(std::min(K, topk)),
        pairs_(pairs),
        of_half_(K, ranks_),
        of_sums_(static_cast<int64_t>(pairs.size()), topk),
        sums_(pairs.size()) {
    const size_t most = std::max<size_t>(K, pairs.size()) + kLanes;
    for (Half& half : halves_) half = {Vector<Sum>(std::is_same_v<T, Sum> ? 0 : K), Vector<Ranked<Sum>>(most), nullptr};
    ranked_.resize(most);
    scratch_.resize(most);
  }

  void find(const T* first, const T* second, int64_t* indices, Sum* scores) {
    rank(halves_[0], first);
    rank(halves_[1], second);
    for (size_t i = 0; i < pairs_.size(); ++i) sums_[i] = score(0, pairs_[i].first) + score(1, pairs_[i].second);
    const int64_t found = of_sums_.find(sums_.data(), static_cast<int64_t>(pairs_.size()));
    for (int64_t i = 0; i < found; ++i) {
      const uint32_t place = of_sums_.place(i);
      const Pair pair = pairs_[place];
      ranked_[i] = ranked(sums_[place], static_cast<uint32_t>(index(0, pair.first) * K_ + index(1, pair.second)));
    }
    order(ranked_, found, scratch_);
    order_equals(found);
    for (int64_t t = 0; t < topk_; ++t) {
      indices[t] = index_of(ranked_[t]);
      scores[t] = halves_[0].scores[indices[t] / K_] + halves_[1].scores[indices[t] % K_];
    }
  }

 private:
  struct Half {
    Vector<Sum> widened; // unless the scores are sums already
    Vector<Ranked<Sum>> best; // sorted
    const Sum* scores;
  };

  void rank(Half& half, const T* scores) {
    if constexpr (std::is_same_v<T, Sum>) {
      half.scores = scores;
    } else {
      std::transform(scores, scores + K_, half.widened.begin(), [](T score) { return widen<Sum>(score); });
      half.scores = half.widened.data();
    }
    const int64_t found = of_half_.find(half.scores, K_);
    for (int64_t i = 0; i < found; ++i) half.best[i] = ranked(half.scores[of_half_.place(i)], of_half_.place(i));
    order(half.best, found, scratch_);
  }
  int64_t index(int half, int64_t rank) const {
    return index_of(halves_[half].best[rank]);
  }
  Sum score(int half, int64_t rank) const {
    return halves_[half].scores[index(half, rank)];
  }

  // Sums that rounded to the same number stand in the order of what they are.
  void order_equals(int64_t found) {
    const auto error = [&](Ranked<Sum> one) {
      return lost(halves_[0].scores[index_of(one) / K_], halves_[1].scores[index_of(one) % K_]);
    };
    for (int64_t begin = 0, end; begin < found; begin = end) {
      for (end = begin + 1; end < found && same_score(ranked_[begin], ranked_[end]);) ++end;
      if (end - begin == 1) continue;
      std::sort(ranked_.begin() + begin, ranked_.begin() + end, [&](Ranked<Sum> a, Ranked<Sum> b) {
        const Sum left = error(a), right = error(b);
        return left != right ? left > right : a > b;
      });
    }
  }

  int64_t K_, topk_, ranks_;
  const std::vector<Pair>& pairs_;
  Contenders<Sum> of_half_, of_sums_;
  Half halves_[2];
  Vector<Sum> sums_;
  Vector<Ranked<Sum>> ranked_, scratch_;
};

// Half scores [n, K] of queries [n, D / 2] and keys [D / 2, K].
void multiply(const Tensor& queries, const Tensor& keys, Tensor& scores) {
  // Past the dispatcher, so that autocast rounds nothing.
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(scores.get(), queries.get(), keys.get()));
}

// Queries [rows, D / 2] of both halves, from row ``first`` on. Views are made before threads start: they take no part
// in autograd there.
struct Tile {
  int64_t first, rows;
  Tensor halves[2];
};

std::vector<Tile> tiles_of(Tensor& queries, int64_t c, int64_t size) {
  using torch::stable::narrow;
  const int64_t N = queries.size(0), half = queries.size(2) / 2;
  std::vector<Tile> tiles;
  for (int64_t n = 0; n < N; n += size) {
    Tensor rows = narrow(queries, 0, n, std::min(size, N - n));
    Tensor book = torch::stable::select(rows, 1, c);
    tiles.push_back({n, std::min(size, N - n), {narrow(book, 1, 0, half), narrow(book, 1, half, half)}});
  }
  return tiles;
}

// Memory for the half scores of one tile, and views of it for a whole tile and for the last one.
struct Scores {
  Tensor halves[2], last[2];
};

std::vector<Scores> memory_for(const Tensor& like, int64_t count, int64_t size, int64_t last, int64_t K) {
  std::vector<Scores> found;
  for (int64_t i = 0; i < count; ++i) {
    Tensor first = new_tensor(like, {size, K}, like.scalar_type());
    Tensor second = new_tensor(like, {size, K}, like.scalar_type());
    found.push_back(
        {{first, second}, {torch::stable::narrow(first, 0, 0, last), torch::stable::narrow(second, 0, 0, last)}});
  }
  return found;
}

template <class T>
void find_all(Tensor& queries, const Tensor& keys, int64_t topk, int64_t* indices, Accumulator<T>* scores) {
  using torch::stable::select;
  const int64_t N = queries.size(0), C = queries.size(1), K = keys.size(2);
  if (N == 0) return;
  const std::vector<Pair> pairs = pairs_of_ranks(std::min(K, topk), topk);
  const int64_t size = std::min(N, std::max<int64_t>(kFewestRows, kHeldScores / (2 * K)));
  const int64_t count = (N + size - 1) / size, last = N - (count - 1) * size;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::vector<Scores> memory = memory_for(queries, threads, size, last, K);
  for (int64_t c = 0; c < C; ++c) {
    const Tensor book = select(keys, 0, c);
    const Tensor across[] = {
        torch::stable::transpose(select(book, 0, 0), 0, 1), torch::stable::transpose(select(book, 0, 1), 0, 1)};
    const std::vector<Tile> tiles = tiles_of(queries, c, size);
    std::atomic<int64_t> taken{0};
    parallel(count, (count + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      Scores& mine = memory[taken++];
      Finder<T> finder(K, topk, pairs);
      for (int64_t t = begin; t < end; ++t) {
        const Tile& tile = tiles[t];
        Tensor* const of = tile.rows == size ? mine.halves : mine.last;
        for (int h = 0; h < 2; ++h) multiply(tile.halves[h], across[h], of[h]);
        const T *first = of[0].const_data_ptr<T>(), *second = of[1].const_data_ptr<T>();
        for (int64_t row = 0; row < tile.rows; ++row) {
          const int64_t to = ((tile.first + row) * C + c) * topk;
          finder.find(first + row * K, second + row * K, indices + to, scores + to);
        }
      }
    });
  }
}

} // namespace

std::tuple<Tensor, Tensor> product_nearest(Tensor queries, Tensor keys, int64_t topk) {
  require_cpu(queries, "queries");
  require_cpu(keys, "keys");
  const ScalarType type = queries.scalar_type();
  require(is_floating(type), "expected queries float16, bfloat16, float32 or float64, got ", dtype_name(type));
  require(keys.scalar_type() == type, "expected keys ", dtype_name(type), " as queries, got ",
          dtype_name(keys.scalar_type()));
  require_shape(keys, "keys", {-1, 2, -1, -1});
  const int64_t C = keys.size(0), K = keys.size(2);
  require_shape(queries, "queries", {-1, C, 2 * keys.size(3)});
  require(K <= kMostHalves, "expected at most ", kMostHalves, " keys of a half, got ", K);
  require(topk >= 1 && topk <= K * K, "expected topk from 1 to K * K = ", K * K, ", got ", topk);
  const int64_t N = queries.size(0);
  Tensor indices = new_tensor(queries, {N, C, topk}, ScalarType::Long);
  Tensor scores = new_tensor(
      queries, {N, C, topk}, type == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  with_floating(type, [&](auto value) {
    using T = decltype(value);
    find_all<T>(queries, keys, topk, indices.mutable_data_ptr<int64_t>(), scores.mutable_data_ptr<Accumulator<T>>());
  });
  return {indices, scores};
}

} // namespace kvb

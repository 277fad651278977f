// One step of training on codes, of which nothing but the touched rows of the table is ever written: sgd_step_.
//
// Every codebook gets the same gradient row for a position. So a row's gradient is a sum of few rows that stay in
// cache: it is never kept, and most of them, those of one position alone, need no sum at all.
#include "ops.h"
#include "pooled.h"

#include <cmath>
#include <memory>

namespace kvb {
namespace {

// --- the loss --------------------------------------------------------------------------------------------------------

// Cross entropy of one sample with label smoothing; ``grad`` gets ``scale`` times its gradient.
template <class Sum>
Sum cross_entropy(const Sum* logits, int64_t V, int64_t target, Sum smoothing, Sum scale, Sum* grad) {
  const Sum highest = *std::max_element(logits, logits + V), each = smoothing / V;
  Sum total = 0, sum = 0;
  for (int64_t v = 0; v < V; ++v) {
    grad[v] = std::exp(logits[v] - highest);
    total += grad[v];
    sum += logits[v] - highest;
  }
  for (int64_t v = 0; v < V; ++v) grad[v] = (grad[v] / total - each - (v == target ? 1 - smoothing : 0)) * scale;
  return std::log(total) - (1 - smoothing) * (logits[target] - highest) - each * sum;
}

void require_classes(const Tensor& targets, int64_t V) {
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < targets.numel(); ++b) {
    if (target[b] >= 0 && target[b] < V) continue;
    std::ostringstream message; // out_of_range becomes IndexError in Python
    message << "target " << target[b] << " is out of bounds for " << V << " classes";
    throw std::out_of_range(message.str());
  }
}

// --- logits ----------------------------------------------------------------------------------------------------------

constexpr int64_t kParts = 1 << 20; // numbers of partial sums that stay in cache

int64_t groups_of(int64_t C) {
  return (C + kBooks - 1) / kBooks;
}

// A thread's groups of codebooks must be the same in every pass: the caches that it filled are its own.
template <class F>
void for_groups(int64_t C, int64_t work, const F& visit) {
  parallel(groups_of(C), kSerial / std::max<int64_t>(work * kBooks, 1), visit);
}

// Means over codebooks [N, V], rounded as gather rounds them.
template <class T, class Sum>
void mean_values(const T* table, const Walk& all, int64_t V, Sum* means) {
  const int64_t C = all.size[2], N = all.size[0] * all.size[1], groups = groups_of(C), tile = kListed / kBooks;
  if (groups * N * V > kParts) {
    std::vector<T> rounded(N * V);
    gather_pooled(table, all, V, true, rounded.data());
    std::transform(rounded.begin(), rounded.end(), means, [](T mean) { return widen<Sum>(mean); });
    return;
  }
  std::vector<Sum> parts(groups * N * V);
  for_groups(C, N * V, [&](int64_t begin, int64_t end) {
    std::array<Row, kListed> rows;
    for (int64_t g = begin; g < end; ++g) {
      const Walk part = codebooks(all, g * kBooks, std::min(C, (g + 1) * kBooks));
      for (int64_t n = 0; n < N; n += tile)
        sum_codebooks(table, part, n, std::min(N, n + tile), V, rows.data(), parts.data() + (g * N + n) * V);
    }
  });
  std::fill_n(means, N * V, Sum{0});
  for (int64_t g = 0; g < groups; ++g) add_row(means, parts.data() + g * N * V, N * V);
  for (int64_t i = 0; i < N * V; ++i) means[i] = widen<Sum>(static_cast<T>(means[i] / static_cast<Sum>(C)));
}

// Logits [B, V] from means over codebooks [B, S, V], the gradient that each fetched value gets, and the loss.
template <class Sum>
double losses(const Sum* means, const int64_t* targets, int64_t B, int64_t S, int64_t C, int64_t V, Sum smoothing,
              Sum* logits, Sum* grads, int64_t stride) {
  std::vector<Sum> loss(B);
  const Sum scale = static_cast<Sum>(1.0 / (static_cast<double>(B) * S * C));
  parallel(B, kSerial / std::max<int64_t>((S + 8) * V, 1), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Sum* const row = logits + b * V;
      std::fill_n(row, V, Sum{0});
      for (int64_t s = 0; s < S; ++s) add_row(row, means + (b * S + s) * V, V);
      for (int64_t v = 0; v < V; ++v) row[v] /= static_cast<Sum>(S);
      loss[b] = cross_entropy(row, V, targets[b], smoothing, scale, grads + b * stride);
    }
  });
  double total = 0;
  for (Sum one : loss) total += one;
  return total / B;
}

// --- touched rows ----------------------------------------------------------------------------------------------------

constexpr int64_t kFetched = 32; // rows between a fetch and its use: all of them come from far away
constexpr int64_t kKept = 1 << 22; // codes whose chains are kept between the passes: 32 MB

constexpr int64_t kLanes = 4; // floats of a vector that every machine has
constexpr int64_t kColumns = 4 * kLanes; // of a sum that stays in registers

// The gradient rows of fetched values: [B, V], the same one for all S positions of a sample. Zeros end each row, so that
// it is whole vectors.
template <class Sum>
struct Gradient {
  const Sum* rows;
  int64_t width, stride, positions; // V, from row to row, S

  static int64_t padded(int64_t width) {
    return (width + kLanes - 1) / kLanes * kLanes;
  }

  int64_t sample(int64_t position) const {
    return positions == 1 ? position : position / positions; // a division takes longer than all else
  }
  const Sum* at(int64_t position) const {
    return rows + sample(position) * stride;
  }
  // The sum over a chain of positions, ``stride`` numbers.
  void add(int32_t position, const int32_t* next, Sum* sum) const {
    for (int64_t v = 0; v < stride; v += kColumns) {
      switch (std::min(kColumns, stride - v) / kLanes) {
        case 1: add_columns<kLanes>(position, next, v, sum); break;
        case 2: add_columns<2 * kLanes>(position, next, v, sum); break;
        case 3: add_columns<3 * kLanes>(position, next, v, sum); break;
        default: add_columns<kColumns>(position, next, v, sum);
      }
    }
  }

 private:
  template <int64_t Columns>
  void add_columns(int32_t position, const int32_t* next, int64_t v, Sum* sum) const {
    Sum total[Columns] = {};
    for (; position >= 0; position = next[position]) {
      const Sum* const row = at(position) + v;
      for (int64_t i = 0; i < Columns; ++i) total[i] += row[i];
    }
    std::copy_n(total, Columns, sum + v);
  }
};

template <class Sum>
double square(const Sum* row, int64_t width) {
  double total = 0;
  for (int64_t v = 0; v < width; ++v) total += static_cast<double>(row[v]) * row[v];
  return total;
}

// What one thread needs to chain codebooks, one after the other.
struct Heads {
  static constexpr int64_t kOrigins = 1 << 24; // far from overflow, and seldom reached

  std::vector<int32_t> first; // [K]: where each row's chain begins so far, plus ``origin``; below it: nowhere
  std::vector<int32_t> joined; // positions that a later one fetches the same row as
  int32_t origin = 0;

  explicit Heads(int64_t K) : first(K, -1) {}

  // Forget all chains, without a pass over K.
  void clear(int64_t N) {
    joined.clear();
    if (origin + 2 * N <= kOrigins) {
      origin += static_cast<int32_t>(N);
    } else {
      std::fill(first.begin(), first.end(), -1);
      origin = 0;
    }
  }
};

// The positions of some codebooks [c, N], in batch order, chained where they fetch the same row.
struct Chains {
  static constexpr int32_t kLater = -1; // the row of a position that is not the first of its chain
  static constexpr int32_t kEnd = -1; // the next position after the last

  int64_t positions; // N
  // Left uninitialised: every row is read from the codes, and only chains have a next position.
  std::unique_ptr<int32_t[]> row; // the row of a position alone; -2 - row where a longer chain begins
  std::unique_ptr<int32_t[]> next; // of a chain

  Chains(int64_t positions, int64_t codebooks)
      : positions(positions), row(new int32_t[codebooks * positions]), next(new int32_t[codebooks * positions]) {}

  // Chain codebooks [c0, c1) of ``indices``, kept from codebook ``c0 - origin`` on: visit(codebook, first position,
  // next) for every chain longer than one.
  template <class F>
  void build(const Tensor& indices, int64_t c0, int64_t c1, int64_t origin, Heads& heads, const F& visit) {
    with_integer(indices.scalar_type(), [&](auto index) { read<decltype(index)>(indices, c0, c1, origin); });
    for (int64_t c = c0; c < c1; ++c) {
      int32_t *const rows = &row[(c - origin) * positions], *const nexts = &next[(c - origin) * positions];
      link(rows, nexts, heads);
      for (int32_t n : heads.joined)
        if (rows[n] != kLater) visit(c, n, nexts);
    }
  }

private:
  // Chain one codebook. On its own, so that all it needs is in registers.
  [[gnu::noinline]] void link(int32_t* rows, int32_t* nexts, Heads& heads) const {
    heads.clear(positions);
    heads.joined.resize(positions);
    int32_t *const firsts = heads.first.data(), *joined = heads.joined.data();
    const int32_t origin = heads.origin; // the compiler cannot know that writing rows leaves it alone
    for (int32_t n = static_cast<int32_t>(positions) - 1; n >= 0; --n) {
      const int32_t at = rows[n], later = firsts[at] - origin;
      firsts[at] = origin + n;
      if (later < 0) continue;
      if (rows[later] >= 0) nexts[later] = kEnd;
      rows[later] = kLater;
      nexts[n] = later;
      rows[n] = -2 - at;
      *joined++ = n;
    }
    heads.joined.resize(joined - heads.joined.data());
  }

  // Codebooks follow each other closely: their codes share cache lines.
  template <class Index>
  void read(const Tensor& indices, int64_t c0, int64_t c1, int64_t origin) {
    const Index* const codes = static_cast<const Index*>(indices.const_data_ptr());
    const int64_t B = indices.size(0), S = indices.size(1), batch = indices.stride(0), position = indices.stride(1);
    int32_t* rows = &row[(c0 - origin) * positions];
    for (int64_t c = c0; c < c1; ++c) {
      const Index* const code = codes + c * indices.stride(2);
      for (int64_t b = 0; b < B; ++b)
        for (int64_t s = 0; s < S; ++s) *rows++ = static_cast<int32_t>(code[b * batch + s * position]);
    }
  }
};

// All chains, and the norm of the gradient: rows of one position alone are counted in one sum for all codebooks, and
// chains correct it. One thread sums the corrections of a codebook; they are added in order.
template <class Sum>
double chain_all(const Tensor& indices, int64_t K, const Gradient<Sum>& grad, bool kept, Chains& chains) {
  const int64_t C = indices.size(2), N = chains.positions, V = grad.width;
  std::vector<double> squares(indices.size(0)), corrections(C);
  double total = 0;
  for (size_t b = 0; b < squares.size(); ++b) total += squares[b] = square(grad.rows + b * grad.stride, V);
  total *= static_cast<double>(grad.positions) * C;
  for_groups(C, N, [&](int64_t begin, int64_t end) {
    Heads heads(K);
    Chains own(N, kept ? 0 : kBooks);
    std::vector<Sum> sum(grad.stride);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t c0 = g * kBooks, c1 = std::min(C, c0 + kBooks);
      (kept ? chains : own).build(indices, c0, c1, kept ? 0 : c0, heads, [&](int64_t c, int32_t n, const int32_t* next) {
        grad.add(n, next, sum.data());
        double apart = 0;
        for (int32_t at = n; at >= 0; at = next[at]) apart += squares[grad.sample(at)];
        corrections[c] += square(sum.data(), V) - apart;
      });
    }
  });
  for (double correction : corrections) total += correction;
  return std::sqrt(std::max(total, 0.0));
}

// Subtract ``step`` times the gradient from one row. Rows are short: a vector that overlaps the one before ends a row of
// floats, instead of single numbers.
template <class T, class Sum>
inline void move_row(T* __restrict row, const Sum* __restrict grad, int64_t width, Sum step) {
  const auto moved = [&](int64_t v) { return static_cast<T>(widen<Sum>(row[v]) - step * grad[v]); };
  if (std::is_same_v<T, float> && width >= kLanes) {
    T last[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) last[i] = moved(width - kLanes + i);
    for (int64_t v = 0; v + kLanes <= width; v += kLanes)
      for (int64_t i = 0; i < kLanes; ++i) row[v + i] = moved(v + i);
    for (int64_t i = 0; i < kLanes; ++i) row[width - kLanes + i] = last[i];
  } else {
    for (int64_t v = 0; v < width; ++v) row[v] = moved(v);
  }
}

// Subtract ``step`` times the gradient from the touched rows of some codebooks that lie one after the other.
template <class T, class Sum>
void move_rows(T* table, int64_t codebooks, int64_t K, const int32_t* row, const int32_t* next,
               const Gradient<Sum>& grad, int64_t N, Sum step, Sum* sum) {
  const int64_t V = grad.width, book = K * V;
  const int32_t* const end = row + codebooks * N;
  const auto place = [&](T* of, int32_t at) { return of + (at >= 0 ? at : -2 - at) * V; };
  for (int64_t c = 0; c < codebooks; ++c, table += book, next += N) {
    for (int64_t n = 0; n < N; ++n, ++row) {
      // Beyond this codebook it is a guess at best where a codebook is shorter than that.
      if (row + kFetched < end && row[kFetched] != Chains::kLater)
        prefetch(place(n + kFetched < N ? table : table + book, row[kFetched]), V * sizeof(T));
      if (*row >= 0) {
        move_row(place(table, *row), grad.at(n), V, step);
      } else if (*row != Chains::kLater) {
        grad.add(static_cast<int32_t>(n), next, sum);
        move_row(place(table, *row), sum, V, step);
      }
    }
  }
}

// Last codebooks first: the rows that the pass over the logits fetched last are still in cache.
template <class T, class Sum>
void move_all(T* table, const Tensor& indices, int64_t K, const Gradient<Sum>& grad, bool kept, Chains& chains, Sum step) {
  const int64_t C = indices.size(2), N = chains.positions, V = grad.width;
  for_groups(C, N * V, [&](int64_t begin, int64_t end) {
    Heads heads(kept ? 0 : K);
    Chains own(N, kept ? 0 : kBooks);
    std::vector<Sum> sum(grad.stride);
    for (int64_t g = end - 1; g >= begin; --g) {
      const int64_t c0 = g * kBooks, c1 = std::min(C, c0 + kBooks);
      if (!kept) own.build(indices, c0, c1, c0, heads, [](int64_t, int32_t, const int32_t*) {});
      const Chains& of = kept ? chains : own;
      const int64_t at = kept ? c0 * N : 0;
      move_rows(
          table + c0 * K * V, c1 - c0, K, of.row.get() + at, of.next.get() + at, grad, N, step, sum.data());
    }
  });
}

} // namespace

std::tuple<Tensor, Tensor, Tensor> sgd_step_(
    Tensor values, Tensor indices, Tensor targets, double lr, double max_norm, double label_smoothing) {
  require_floating(values, "values");
  require_shape(values, "values", {-1, -1, -1});
  require(values.is_contiguous(), "expected contiguous values, got a table with other strides");
  const int64_t C = values.size(0), K = values.size(1), V = values.size(2);
  require_codes(indices, C, K);
  const int64_t B = indices.size(0), S = indices.size(1), N = B * S;
  require(N < INT32_MAX / 2 && K < INT32_MAX, "expected fewer than 2^30 positions and 2^31 pairs, got ", N, " and ", K);
  require_cpu(targets, "targets");
  require(
      targets.scalar_type() == ScalarType::Long, "expected targets torch.int64, got ",
      dtype_name(targets.scalar_type()));
  require_shape(targets, "targets", {B});
  targets = torch::stable::contiguous(targets);
  require_classes(targets, V);

  const ScalarType exact = values.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor loss = torch::stable::new_empty(values, {}, exact), norm = torch::stable::new_empty(values, {}, exact);
  Tensor logits = torch::stable::new_empty(values, {B, V}, exact);
  with_floating(values.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using Sum = Accumulator<T>;
    T* const table = values.mutable_data_ptr<T>();
    const int64_t stride = Gradient<Sum>::padded(V);
    std::vector<Sum> means(N * V), rows(B * stride);
    mean_values<T>(table, walk(indices, {}, K * V, V), V, means.data());
    *loss.mutable_data_ptr<Sum>() = static_cast<Sum>(losses(
        means.data(), targets.const_data_ptr<int64_t>(), B, S, C, V, static_cast<Sum>(label_smoothing),
        logits.mutable_data_ptr<Sum>(), rows.data(), stride));
    const Gradient<Sum> grad{rows.data(), V, stride, S};
    const bool kept = C * N <= kKept;
    Chains chains(N, kept ? C : 0);
    const double length = chain_all(indices, K, grad, kept, chains);
    *norm.mutable_data_ptr<Sum>() = static_cast<Sum>(length);
    const double share = max_norm / (length + 1e-6);
    move_all(table, indices, K, grad, kept, chains, static_cast<Sum>(lr * (share < 1 ? share : 1.0)));
  });
  return {loss, norm, logits};
}

} // namespace kvb

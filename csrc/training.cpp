// One step of training on codes, of which nothing but the touched rows of the table is ever written: sgd_step_.
//
// Every codebook gets the same gradient row for a position. So a row's gradient is a sum of few rows that stay in
// cache, and is summed twice, for the norm and for the update, rather than kept.
#include "ops.h"
#include "pooled.h"

#include <cmath>

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

// Logits [B, V] from means over codebooks [B, S, V], the gradient that each fetched value gets [B, V], and the loss.
template <class T, class Sum>
double losses(const T* means, const int64_t* targets, int64_t B, int64_t S, int64_t C, int64_t V, Sum smoothing,
              Sum* logits, Sum* grads) {
  std::vector<Sum> loss(B);
  const Sum scale = static_cast<Sum>(1.0 / (static_cast<double>(B) * S * C));
  parallel(B, kSerial / std::max<int64_t>((S + 8) * V, 1), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Sum* const row = logits + b * V;
      std::fill_n(row, V, Sum{0});
      for (int64_t s = 0; s < S; ++s) add_row(row, means + (b * S + s) * V, V);
      for (int64_t v = 0; v < V; ++v) row[v] /= static_cast<Sum>(S);
      loss[b] = cross_entropy(row, V, targets[b], smoothing, scale, grads + b * V);
    }
  });
  double total = 0;
  for (Sum one : loss) total += one;
  return total / B;
}

// --- touched rows ----------------------------------------------------------------------------------------------------

// The positions of every codebook, chained where they fetch the same row, in batch order.
struct Chains {
  int64_t positions; // N = B * S
  std::vector<int32_t> row; // [C, N]: what a position fetches, or -1 where an earlier one fetches the same
  std::vector<int32_t> next; // [C, N]: the next position with the same row, or -1
};

constexpr int64_t kCodebooks = 16; // read together: their codes share cache lines

template <class Index>
void read_codes(const Tensor& indices, int64_t c0, int64_t c1, Chains& chains) {
  const Index* code = static_cast<const Index*>(indices.const_data_ptr());
  const int64_t B = indices.size(0), S = indices.size(1), step = indices.stride(2);
  for (int64_t b = 0, n = 0; b < B; ++b) {
    for (int64_t s = 0; s < S; ++s, ++n) {
      const Index* at = code + b * indices.stride(0) + s * indices.stride(1);
      for (int64_t c = c0; c < c1; ++c) chains.row[c * chains.positions + n] = static_cast<int32_t>(at[c * step]);
    }
  }
}

// The gradient rows of a fetched value: [B, V], the same one for all positions of a sample.
template <class Sum>
struct Gradient {
  const Sum* rows;
  int64_t width, positions; // V, S

  const Sum* at(int64_t position) const {
    return rows + position / positions * width;
  }
  // The sum over a chain of more than one position.
  const Sum* chained(int64_t position, const int32_t* next, Sum* sum) const {
    std::copy_n(at(position), width, sum);
    for (position = next[position]; position >= 0; position = next[position]) add_row(sum, at(position), width);
    return sum;
  }
};

template <class Sum>
double square(const Sum* row, int64_t width) {
  double total = 0;
  for (int64_t v = 0; v < width; ++v) total += static_cast<double>(row[v]) * row[v];
  return total;
}

// Chain one codebook, whose rows were read; ``head`` [K] is -1 before and after. The squared norm of its gradient.
template <class Sum>
double chain(int32_t* row, int32_t* next, int64_t N, int32_t* head, const Gradient<Sum>& grad, const double* squares,
             Sum* sum) {
  for (int64_t n = N - 1; n >= 0; --n) {
    next[n] = head[row[n]];
    head[row[n]] = static_cast<int32_t>(n);
  }
  double total = 0;
  for (int64_t n = 0; n < N; ++n) {
    const bool first = head[row[n]] == n;
    if (first) {
      head[row[n]] = -1;
      total += next[n] < 0 ? squares[n / grad.positions] : square(grad.chained(n, next, sum), grad.width);
    } else {
      row[n] = -1;
    }
  }
  return total;
}

// All chains, and the norm of the gradient; one codebook's share is summed by one thread, and the shares in order.
template <class Sum>
double chain_all(const Tensor& indices, int64_t K, const Gradient<Sum>& grad, Chains& chains) {
  const int64_t C = indices.size(2), N = chains.positions, V = grad.width;
  std::vector<double> squares(indices.size(0)), shares(C);
  for (size_t b = 0; b < squares.size(); ++b) squares[b] = square(grad.rows + b * V, V);
  const int64_t groups = (C + kCodebooks - 1) / kCodebooks;
  parallel(groups, kSerial / std::max<int64_t>(N * kCodebooks, 1), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> head(K, -1);
    std::vector<Sum> sum(V);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t c0 = g * kCodebooks, c1 = std::min(C, c0 + kCodebooks);
      with_integer(indices.scalar_type(), [&](auto index) { read_codes<decltype(index)>(indices, c0, c1, chains); });
      for (int64_t c = c0; c < c1; ++c)
        shares[c] = chain(&chains.row[c * N], &chains.next[c * N], N, head.data(), grad, squares.data(), sum.data());
    }
  });
  double total = 0;
  for (double share : shares) total += share;
  return std::sqrt(total);
}

template <class T, class Sum>
void move_row(T* __restrict row, const Sum* __restrict grad, int64_t width, Sum step) {
  for (int64_t v = 0; v < width; ++v) row[v] = static_cast<T>(widen<Sum>(row[v]) - step * grad[v]);
}

template <class T, class Sum>
void move_rows(T* table, int64_t C, int64_t K, const Gradient<Sum>& grad, const Chains& chains, Sum step) {
  const int64_t N = chains.positions, V = grad.width;
  parallel(C, kSerial / std::max<int64_t>(N * V, 1), [&](int64_t begin, int64_t end) {
    std::vector<Sum> sum(V);
    // The chains lie one after the other, so that rows are fetched ahead into the next codebook.
    const int64_t last = end * N;
    const auto fetch = [&](int64_t at) {
      if (at < last && chains.row[at] >= 0) prefetch(table + (at / N * K + chains.row[at]) * V, V * sizeof(T));
    };
    for (int64_t c = begin; c < end; ++c) {
      const int32_t *row = &chains.row[c * N], *next = &chains.next[c * N];
      for (int64_t n = 0; n < N; ++n) {
        fetch(c * N + n + kAhead);
        if (row[n] < 0) continue;
        const Sum* moved = next[n] < 0 ? grad.at(n) : grad.chained(n, next, sum.data());
        move_row(table + (c * K + row[n]) * V, moved, V, step);
      }
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
  require(N < INT32_MAX && K < INT32_MAX, "expected fewer than 2^31 positions and pairs, got ", N, " and ", K);
  require_cpu(targets, "targets");
  require(targets.scalar_type() == ScalarType::Long, "expected targets torch.int64, got ",
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
    std::vector<T> means(N * V);
    gather_pooled(static_cast<const T*>(table), walk(indices, {}, K * V, V), V, true, means.data());
    std::vector<Sum> rows(B * V);
    *loss.mutable_data_ptr<Sum>() = static_cast<Sum>(losses(
        means.data(), targets.const_data_ptr<int64_t>(), B, S, C, V, static_cast<Sum>(label_smoothing),
        logits.mutable_data_ptr<Sum>(), rows.data()));
    Chains chains{N, std::vector<int32_t>(C * N), std::vector<int32_t>(C * N)};
    const Gradient<Sum> grad{rows.data(), V, S};
    const double length = chain_all(indices, K, grad, chains);
    *norm.mutable_data_ptr<Sum>() = static_cast<Sum>(length);
    const double share = max_norm / (length + 1e-6);
    move_rows(table, C, K, grad, chains, static_cast<Sum>(lr * (share < 1 ? share : 1.0)));
  });
  return {loss, norm, logits};
}

} // namespace kvb

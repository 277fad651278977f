// One step of training on codes, of which nothing but the touched rows of the table is ever written: sgd_step_.
//
// Every codebook gets the same gradient row for a position. So where a batch fetches few of the rows, most of them need
// none of their own: those that several positions fetch get a sum, and all are listed with the row that they get.
#include "../ops.h"
#include "crowded.h"
#include "loss.h"

#include <cmath>
#include <limits>

namespace kvb {
namespace {

// --- touched rows ----------------------------------------------------------------------------------------------------

// A row, counted from the first one of the group, and its gradient: that of a position, or N plus the number of a sum.
struct TouchedRow {
  int32_t row, gradient;
};

// A position whose gradient is part of a sum.
struct Addend {
  int32_t sum, position;
};

// What a thread needs to list one group after the other; it takes memory when it is used.
struct Scratch {
  const int64_t K, books, positions;
  Vector<int32_t> place; // [K]: where a row of the codebook is listed, plus ``origin``; below it: nowhere
  Vector<int32_t> codes; // [books, N]
  Vector<Addend> again; // of one codebook: a place that was taken, and a position
  int32_t origin = 0;

  // Forget all places, without a pass over K.
  void clear() {
    codes.resize(books * positions);
    again.resize(positions);
    const int32_t most = static_cast<int32_t>(codes.size());
    if (!place.empty() && origin < INT32_MAX - 2 * most) {
      origin += most;
    } else {
      place.assign(K, -1);
      origin = 0;
    }
  }
};

// What a batch does to a few codebooks: the rows that it touches, each once, with their gradients. Where several
// positions fetch one row, that is a sum over them, in batch order.
template <class Sum>
class Group {
 public:
  Group(int64_t books, int64_t positions)
      : N_(static_cast<int32_t>(positions)),
        touched_(new_buffer<TouchedRow>(books * positions)),
        addends_(new_buffer<Addend>(books * positions)) {}

  // Begin with the codes of codebooks [c0, c1).
  void read(const Tensor& indices, int64_t c0, int64_t c1, Scratch& scratch) {
    scratch.clear();
    end_ = added_ = summed_ = 0;
    read_codes(indices, c0, c1, scratch.codes.data());
  }

  // List the rows of the next codebook; fetch(row) is called at every position.
  template <class F>
  void list(int64_t book, int64_t K, Scratch& scratch, const F& fetch) {
    const int64_t again = list_rows(scratch.codes.data() + book * N_, static_cast<int32_t>(book * K), scratch, fetch);
    join(scratch.again.data(), again);
  }

  void sum(const Gradient<Sum>& grad) {
    sums_.assign(summed_ * grad.width, Sum{0});
    for (int32_t i = 0; i < added_; ++i)
      add_short_row(sums_.data() + addends_[i].sum * grad.width, grad.at(addends_[i].position), grad.width);
  }

  // What sums add to the squared norm of the gradient, beyond that of their parts.
  double correction(const Gradient<Sum>& grad) const {
    double total = 0;
    for (int32_t i = 0; i < added_; ++i) total -= grad.squares[grad.sample(addends_[i].position)];
    for (int32_t i = 0; i < summed_; ++i) total += square(sums_.data() + i * grad.width, grad.width);
    return total;
  }

  // Subtract ``step`` times the gradient from the touched rows; ``table`` begins with the first codebook.
  template <class T>
  void move(T* table, const Gradient<Sum>& grad, Sum step) const {
    const int64_t V = grad.width;
    for (int32_t i = 0; i < end_; ++i) {
      if (i + kRowsAhead < end_) prefetch(table + touched_[i + kRowsAhead].row * V, V * sizeof(T));
      const int64_t gradient = touched_[i].gradient, sum = gradient - N_;
      move_row(table + touched_[i].row * V, sum < 0 ? grad.at(gradient) : sums_.data() + sum * V, V, step);
    }
  }

 private:
  static constexpr int32_t kRowsAhead = 32; // rows between a fetch and its use: all of them come from far away

  // Returns how many positions fetch a row that an earlier one listed. There are no branches: which ones do is hard to
  // guess.
  template <class F>
  [[gnu::noinline]] int64_t list_rows(const int32_t* codes, int32_t first_row, Scratch& scratch, const F& fetch) {
    // In registers: the compiler cannot know that writing the lists leaves these alone.
    int32_t* const place_of = scratch.place.data();
    TouchedRow* const touched = touched_.get();
    Addend *const all_again = scratch.again.data(), *again = all_again;
    const int32_t origin = scratch.origin, begin = end_, N = N_;
    int32_t end = begin;
    for (int32_t n = 0; n < N; ++n) {
      const int32_t row = codes[n], before = place_of[row] - origin;
      fetch(row);
      const bool known = before >= begin;
      const int32_t place = known ? before : end;
      place_of[row] = origin + place;
      touched[end] = {first_row + row, n};
      *again = {place, n};
      end += !known;
      again += known;
    }
    end_ = end;
    return again - all_again;
  }

  // Make sums of the gradients of rows that were listed already.
  void join(const Addend* again, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      int32_t& gradient = touched_[again[i].sum].gradient;
      const bool alone = gradient < N_;
      const int32_t sum = alone ? summed_ : gradient - N_;
      addends_[added_] = {sum, gradient};
      added_ += alone;
      addends_[added_++] = {sum, again[i].position};
      summed_ += alone;
      gradient = N_ + sum;
    }
  }

  int32_t N_, end_ = 0, added_ = 0, summed_ = 0; // positions; lengths of touched, parts and sums
  Buffer<TouchedRow> touched_; // codebook by codebook, in batch order
  Buffer<Addend> addends_; // a sum's addends in batch order
  Vector<Sum> sums_; // [summed, V]
};

// --- the step, row by row --------------------------------------------------------------------------------------------

constexpr int64_t kListBytes = 1 << 25; // of lists kept between the passes: beyond 32 MB, listing again is cheaper
constexpr int64_t kValueBytes = 1 << 18; // of fetched values that wait to be summed: a quarter of an L2 cache

// One step, in passes over the codebooks: sum the values; sum the gradients for their norm and move the rows, at once
// where the step is known.
template <class T>
class TrainingStep {
  using Sum = Accumulator<T>;

 public:
  TrainingStep(T* table, int64_t K, int64_t V, const Tensor& indices)
      : table_(table), indices_(indices), K_(K), V_(V), C_(indices.size(2)), N_(indices.size(0) * indices.size(1)) {
    const int64_t lists = sizeof(TouchedRow) + sizeof(Addend), sums = V * sizeof(Sum) / 2;
    if (C_ * N_ * (lists + sums) > kListBytes || N_ * V * static_cast<int64_t>(sizeof(T)) > kValueBytes) return;
    books_ = std::clamp<int64_t>(C_ / 16, 1, kSummedBooks); // at least 16 groups: work for many threads
    for (int64_t g = 0; g < groups(); ++g) kept_.emplace_back(books_, N_);
  }

  // Means over codebooks [N, V], rounded as gather rounds them.
  Buffer<Sum> means() {
    if (kept_.empty()) return gathered(table_, indices_, K_, V_);
    Buffer<Sum> totals = new_buffer<Sum>(groups() * N_ * V_);
    std::fill_n(totals.get(), groups() * N_ * V_, Sum{0});
    for_groups<false>([&](int64_t g, Scratch& scratch, Group<Sum>&) {
      list_and_add(g, scratch, totals.get() + g * N_ * V_);
    });
    return mean_of_groups<T>(std::move(totals), groups(), N_ * V_, C_);
  }

  double norm(const Gradient<Sum>& grad) {
    return norm_of(grad, [](int64_t, const Group<Sum>&) {});
  }

  void move(const Gradient<Sum>& grad, Sum step) {
    for_groups([&](int64_t g, Scratch& scratch, Group<Sum>& own) {
      move_group(kept_.empty() ? summed(g, grad, scratch, own) : kept_[g], g, grad, step);
    });
  }

  // Both in one pass, for a step that does not depend on the norm.
  double norm_and_move(const Gradient<Sum>& grad, Sum step) {
    return norm_of(grad, [&](int64_t g, const Group<Sum>& group) { move_group(group, g, grad, step); });
  }

 private:
  int64_t groups() const {
    return (C_ + books_ - 1) / books_;
  }

  // A thread's groups are the same in every pass: the caches that it filled are its own. Last groups first: the rows
  // that the pass over the values fetched last are still there.
  template <bool LastFirst = true, class F>
  void for_groups(const F& visit) {
    parallel(groups(), kSerialWork / std::max<int64_t>(N_ * V_ * books_, 1), [&](int64_t begin, int64_t end) {
      Scratch scratch{K_, books_, N_};
      Group<Sum> own(1, kept_.empty() ? N_ : 0);
      for (int64_t i = begin; i < end; ++i) visit(LastFirst ? begin + end - 1 - i : i, scratch, own);
    });
  }

  // The norm of the whole gradient: that of all positions as if they shared no row, and corrections, added in order.
  // Calls then(g, group) once a group has its sums.
  template <class F>
  double norm_of(const Gradient<Sum>& grad, const F& then) {
    if (N_ == 0 || C_ == 0) return 0; // whatever the loss
    Vector<double> corrections(groups());
    for_groups([&](int64_t g, Scratch& scratch, Group<Sum>& own) {
      const Group<Sum>& group = summed(g, grad, scratch, own);
      corrections[g] = group.correction(grad);
      then(g, group);
    });
    double total = 0;
    for (double square : grad.squares) total += square;
    total *= static_cast<double>(grad.positions) * C_;
    for (double correction : corrections) total += correction;
    return std::sqrt(std::max(total, 0.0));
  }

  void move_group(const Group<Sum>& group, int64_t g, const Gradient<Sum>& grad, Sum step) {
    group.move(table_ + g * books_ * K_ * V_, grad, step);
  }

  // List a group and add its values to ``totals``: those of a codebook come from far away while the next one is listed.
  void list_and_add(int64_t g, Scratch& scratch, Sum* totals) {
    const int64_t c0 = g * books_, c1 = std::min(C_, c0 + books_);
    Group<Sum>& group = kept_[g];
    const T* values = table_ + c0 * K_ * V_;
    const auto add = [&](int64_t book) {
      const int32_t* const codes = scratch.codes.data() + book * N_;
      for (int64_t n = 0; n < N_; ++n) add_short_row(totals + n * V_, values + (book * K_ + codes[n]) * V_, V_);
    };
    group.read(indices_, c0, c1, scratch);
    for (int64_t book = 0; book < c1 - c0; ++book) {
      group.list(book, K_, scratch, [=, V = V_, of = values + book * K_ * V_](int32_t row) {
        prefetch(of + row * V, V * sizeof(T));
      });
      if (book > 0) add(book - 1);
    }
    add(c1 - c0 - 1);
  }

  // A group with its sums: one that was kept, or codebook ``g``, listed again.
  Group<Sum>& summed(int64_t g, const Gradient<Sum>& grad, Scratch& scratch, Group<Sum>& own) {
    if (kept_.empty()) {
      own.read(indices_, g, g + 1, scratch);
      own.list(0, K_, scratch, [](int32_t) {});
    }
    Group<Sum>& group = kept_.empty() ? own : kept_[g];
    group.sum(grad);
    return group;
  }

  T* table_;
  const Tensor& indices_;
  int64_t K_, V_, C_, N_;
  int64_t books_ = 1; // codebooks of a group
  Vector<Group<Sum>> kept_; // all groups, or none where they would fill the memory
};

// --- one step -------------------------------------------------------------------------------------------------------

// What the norm of a gradient cannot exceed, in whichever rows it meets; NaN or infinite where a loss was.
template <class Sum>
double longest(const Gradient<Sum>& grad, int64_t C) {
  double total = 0; // of the norms of all positions, as if they met in one row of each codebook
  for (double square : grad.squares) total += std::sqrt(square);
  const double addends = static_cast<double>(grad.squares.size()) * grad.positions;
  const double rounding = 1 + addends * std::numeric_limits<Sum>::epsilon();
  return total * grad.positions * std::sqrt(static_cast<double>(C)) * rounding;
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
  require(N < 1 << 26 && K < 1 << 28, "expected fewer than 2^26 positions and 2^28 pairs, got ", N, " and ", K);
  require_cpu(targets, "targets");
  require(
      targets.scalar_type() == ScalarType::Long, "expected targets torch.int64, got ",
      dtype_name(targets.scalar_type()));
  require_shape(targets, "targets", {B});
  require_apart(values, "values", indices, "indices");
  require_apart(values, "values", targets, "targets");
  targets = compact(targets);
  require_classes(targets, V);

  const ScalarType exact = values.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor loss = new_tensor(values, {}, exact), norm = new_tensor(values, {}, exact);
  Tensor logits = new_tensor(values, {B, V}, exact);
  with_floating(values.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using Sum = Accumulator<T>;
    const auto take = [&](auto&& step) {
      Buffer<Sum> means = step.means();
      const Sum* const from = means.get();
      Gradient<Sum> grad(S == 1 ? std::move(means) : new_buffer<Sum>(B * V), B, S, V);
      *loss.mutable_data_ptr<Sum>() = static_cast<Sum>(losses(
          from, targets.const_data_ptr<int64_t>(), B, C, static_cast<Sum>(label_smoothing),
          logits.mutable_data_ptr<Sum>(), grad));
      const bool whole = longest(grad, C) < max_norm - 1e-5; // beyond what clipping adds to a norm
      const double length = whole ? step.norm_and_move(grad, static_cast<Sum>(lr)) : step.norm(grad);
      *norm.mutable_data_ptr<Sum>() = static_cast<Sum>(length);
      if (whole || !std::isfinite(length)) return; // moved, or without a direction to step in
      const double share = max_norm / (length + 1e-6);
      step.move(grad, static_cast<Sum>(lr * (share < 1 ? share : 1.0)));
    };
    T* const table = values.mutable_data_ptr<T>();
    if (CrowdedStep<T>::pays(values, N)) {
      take(CrowdedStep<T>(table, K, V, indices));
    } else {
      take(TrainingStep<T>(table, K, V, indices));
    }
  });
  return {loss, norm, logits};
}

} // namespace kvb

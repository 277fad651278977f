// The operators of kvb/ops, for the CPU. Each is documented by its reference in kvb/reference.
#pragma once

#include "common.h"

#include <tuple>

namespace kvb {

// search/packing.cpp, search/search.cpp, search/capability.cpp
Tensor pack_keys(Tensor keys);
Tensor packed_matches(Tensor keys, Tensor packed);
std::tuple<Tensor, Tensor> nearest(
    Tensor queries, Tensor keys, Tensor packed, std::optional<Tensor> mask, int64_t topk);
std::tuple<Tensor, Tensor> lookup(
    Tensor queries, Tensor keys, Tensor packed, Tensor values, std::optional<Tensor> mask, std::string pool);

std::string cpu_capability(); // the instruction set in use
int64_t cpu_packed_nbytes(int64_t K, int64_t D, bool float64); // bytes of one packed codebook

// table/positions.cpp
std::tuple<Tensor, Tensor> lookup_positions(
    Tensor queries, Tensor keys, Tensor packed, Tensor values, std::optional<Tensor> mask, std::string pool);

// table/values.cpp
Tensor gather(Tensor values, Tensor indices, std::string pool, std::string layout);
Tensor gather_backward(Tensor grad, Tensor indices, int64_t K, std::string pool);
std::tuple<Tensor, Tensor, Tensor> gather_backward_rows(Tensor grad, Tensor indices, int64_t K, std::string pool);

// table/training.cpp
std::tuple<Tensor, Tensor, Tensor> sgd_step_(
    Tensor values, Tensor indices, Tensor targets, double lr, double max_norm, double label_smoothing);

// table/descent.cpp
std::tuple<Tensor, Tensor> clip_rows_(Tensor grads, Tensor places, double max_norm);
void move_rows_(Tensor values, Tensor places, Tensor grads, double step);

// table/places.cpp
Tensor rows_to_places(Tensor rows, int64_t K);
std::tuple<Tensor, Tensor> places_to_rows(Tensor places, int64_t K);

// table/tally.cpp
Tensor tally_(Tensor counts, Tensor indices, Tensor targets, std::optional<Tensor> weights, bool remove);

// table/update.cpp
Tensor update_keys_(
    Tensor keys, Tensor keys_avg, Tensor cluster_size, Tensor hits, Tensor sums, std::optional<Tensor> spare,
    std::optional<Tensor> usable, double decay, double eps, double threshold, double start, bool rescale_all);

// memory/product_keys.cpp
std::tuple<Tensor, Tensor> product_nearest(Tensor queries, Tensor keys, int64_t topk);

// memory/weighted.cpp
Tensor gather_weighted(Tensor values, Tensor indices, Tensor weights);
Tensor gather_dot(Tensor values, Tensor indices, Tensor vectors);
std::tuple<Tensor, Tensor, Tensor> scatter_weighted_rows(Tensor vectors, Tensor indices, Tensor weights, int64_t K);

// table/statistics.cpp
std::tuple<Tensor, Tensor> accumulate(Tensor queries, Tensor indices, int64_t K);
Tensor count(Tensor queries, Tensor indices, int64_t K);

} // namespace kvb

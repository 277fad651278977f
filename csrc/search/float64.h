// The search of float64 on either side.
#pragma once

#include "../common.h"

namespace kvb {

// Writes indices and squared distances [B, S, C, topk] of queries [B, S, C, D], last axis contiguous, and contiguous
// keys [C, K, D], of which only those that ``mask`` [C, K] allows are found; null allows all.
void search_float64(const Tensor& queries, const Tensor& keys, const bool* mask, int64_t topk, int64_t* indices,
                    double* distances);

} // namespace kvb

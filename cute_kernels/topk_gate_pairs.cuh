// What the gate's choice hands to its sort: tokens of a warp, pairs; and how counts add up.
#pragma once

#include "light_ops.h"
#include "topk_gate_lanes.cuh"
#include "topk_gate_sizes.h"

namespace light::gate {

// Tokens [begin, end) of a warp.
struct TokenRange {
  int begin, end;

  __device__ static TokenRange of_warp(const light_pair_sort &sort, int cta) {
    const int begin = cta * sort.tokens_per_cta;
    const int end = min(begin + sort.tokens_per_cta, sort.num_tokens);
    const int exchanging = exchanging_warps(sort.num_experts);
    const int others = blockDim.x / 32 - exchanging;
    const bool others_suffice = others * sort.tokens_per_warp >= sort.tokens_per_cta;
    const int warp = threadIdx.x / 32 - (others_suffice ? exchanging : 0);
    if (warp < 0) {
      return {end, end};
    }
    return {min(begin + warp * sort.tokens_per_warp, end),
            min(begin + (warp + 1) * sort.tokens_per_warp, end)};
  }
};

struct Pair {
  int index = -1;  // in [T, K]; negative: none
  int token = 0, expert = -1;
  float weight = 0.0f;
};

// Of four neighbouring experts.
struct Column {
  int before[kColumnExperts] = {}, total[kColumnExperts] = {};  // pairs in the CTAs before, in all
  int pair_end = 0, tile_end = 0;                               // of the last one
};

__device__ inline void add_counts(uint2 counts, int (&sums)[kColumnExperts]) {
  sums[0] += counts.x & 0xffff;
  sums[1] += counts.x >> 16;
  sums[2] += counts.y & 0xffff;
  sums[3] += counts.y >> 16;
}

// Replaces a column's counts by what the warps before have; returns what all have. No count
// reaches 2^16, so two of them add up in one addition. Eight loads are under way at once.
__device__ inline uint2 sum_warps(uint2 *column, int num_columns) {
  const int num_warps = blockDim.x / 32;
  uint2 sum{};
#pragma unroll 1
  for (int first = 0; first < num_warps; first += 8) {
    uint2 counts[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      counts[i] = first + i < num_warps ? column[(first + i) * num_columns] : uint2{};
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (first + i < num_warps) {
        column[(first + i) * num_columns] = sum;
      }
      sum.x += counts[i].x;
      sum.y += counts[i].y;
    }
  }
  return sum;
}

}  // namespace light::gate

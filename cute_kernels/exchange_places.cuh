// Where pairs are computed, and the sum of a token's results: what the exchange's plain and bulk
// copies share.
#pragma once

#include "light_ops.h"
#include "rows.cuh"

namespace light {

constexpr int kPositionBits = LIGHT_CHOICE_POSITION_BITS;
constexpr unsigned kAllLanes = 0xffffffffu;

// Where a pair is computed: the rank, and the place among that rank's pairs of this chunk.
struct Place {
  int rank;  // -1: nowhere
  int position;
};

__device__ inline Place place_of(const light_places &places, int source, int choice) {
  if (choice < 0) {
    return {-1, 0};
  }
  const int expert = choice >> kPositionBits, pair = choice & ((1 << kPositionBits) - 1);
  const int row = expert * places.num_copies;
  const int2 *segments = reinterpret_cast<const int2 *>(places.segments) +
                         (long long)source * places.num_experts * places.num_copies + row;
  for (int copy = 0, begin = 0; copy < places.num_copies; ++copy) {
    const int2 segment = segments[copy];  // end, base
    if (pair < segment.x) {
      return {places.copy_ranks[row + copy], segment.y + pair - begin};
    }
    begin = segment.x;
  }
  return {-1, 0};
}

// A token of the chunk, by its rank and its number there.
struct SourceToken {
  int source;  // -1: none
  int token;
};

__device__ inline int count_tokens(const light_exchange_pull_args &args) {
  int total = 0;
  for (int source = 0; source < args.num_ranks; ++source) {
    total += args.count[source];
  }
  return total;
}

// Every rank begins with another one, so that no link has all of them at once.
__device__ inline SourceToken source_of(const light_exchange_pull_args &args, int number,
                                        int total) {
  if (number >= total) {
    return {-1, 0};
  }
  int source = args.rank;
  do {
    source = source + 1 == args.num_ranks ? 0 : source + 1;
    number -= args.count[source];
  } while (number >= 0);
  return {source, number + args.count[source] + args.begin[source]};
}

__device__ inline int choice_of(const light_exchange_pull_args &args, SourceToken from, int pair) {
  if (from.source < 0) {
    return -1;
  }
  return args.choices[from.source * args.choice_stride +
                      (long long)from.token * args.num_experts_per_token + pair];
}

__device__ inline void add_weighted(float *sums, float weight, uint4 vector, const __half *) {
  Eight<__half> eight;
  eight.vector = vector;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    sums[j] = __fadd_rn(sums[j], __fmul_rn(weight, to_float(eight.scalars[j])));
  }
}

__device__ inline void add_weighted(float *sums, float weight, uint4 vector,
                                    const __nv_bfloat16 *) {
  Eight<__nv_bfloat16> eight;
  eight.vector = vector;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    sums[j] = __fadd_rn(sums[j], __fmul_rn(weight, to_float(eight.scalars[j])));
  }
}

__device__ inline void add_weighted(float *sums, float weight, uint4 vector, const float *) {
  const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    sums[j] = __fadd_rn(sums[j], __fmul_rn(weight, __uint_as_float(words[j])));
  }
}

template <typename Scalar>
__device__ inline uint4 rounded(const float *sums) {
  Eight<Scalar> eight;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    eight.scalars[j] = from_float<Scalar>(sums[j]);
  }
  return eight.vector;
}

template <>
__device__ inline uint4 rounded<float>(const float *sums) {
  return {__float_as_uint(sums[0]), __float_as_uint(sums[1]), __float_as_uint(sums[2]),
          __float_as_uint(sums[3])};
}

}  // namespace light

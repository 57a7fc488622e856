// Where pairs are computed, and what a row is as it travels: what the exchange's plain and bulk
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

__device__ inline int count_tokens(const light_chunk &chunk) {
  int total = 0;
  for (int source = 0; source < chunk.num_ranks; ++source) {
    total += chunk.count[source];
  }
  return total;
}

// Every rank begins with another one, so that no link has all of them at once.
__device__ inline SourceToken source_of(const light_chunk &chunk, int number, int total) {
  if (number >= total) {
    return {-1, 0};
  }
  int source = chunk.rank;
  do {
    source = source + 1 == chunk.num_ranks ? 0 : source + 1;
    number -= chunk.count[source];
  } while (number >= 0);
  return {source, number + chunk.count[source] + chunk.begin[source]};
}

// Where a pair of a token is among all shared choices, and their weights.
__device__ inline long long shared_place(const light_chunk &chunk, SourceToken from, int pair) {
  return from.source * chunk.choice_stride +
         (long long)from.token * chunk.num_experts_per_token + pair;
}

// The numbers `first`, `first` + `step`, ... below `total`, for every other warp from the last one
// on: other ranks' tokens come before this one's, and so links and the card's own memory are busy
// beside each other.
struct Turns {
  int first, step, count;
  bool backwards;

  __device__ Turns(int first, int step, int total)
      : first(first),
        step(step),
        count(first < total ? (total - 1 - first) / step + 1 : 0),
        backwards(threadIdx.x / 32 % 2 == 1) {}

  __device__ int operator[](int turn) const {
    return first + step * (backwards ? count - 1 - turn : turn);
  }
};

__device__ inline int choice_of(const light_chunk &chunk, SourceToken from, int pair) {
  return from.source < 0 ? -1 : chunk.choices[shared_place(chunk, from, pair)];
}

// Lane k's is pair k's of a token of some rank.
__device__ inline Place place_of_lane(const light_chunk &chunk, SourceToken from) {
  const int lane = threadIdx.x % 32;
  const bool asks = lane < chunk.num_experts_per_token;
  return place_of(chunk.places, from.source, asks ? choice_of(chunk, from, lane) : -1);
}

// Where the result of a choice lies on its token's rank: by expert, then position.
__device__ inline long long row_of_result(long long first_pair, const int *prefixes, int choice) {
  return first_pair + __ldg(prefixes + (choice >> kPositionBits)) +
         (choice & ((1 << kPositionBits) - 1));
}

// What the experts must know of a pair beside its row.
__device__ inline void describe_pair(const light_exchange_pull_args &args, SourceToken from,
                                     int pair, int position) {
  if (args.weights != nullptr) {
    args.pair_weight[position] = args.weights[shared_place(args.chunk, from, pair)];
  }
  if (args.output_rows != nullptr) {
    const int *prefixes = args.prefixes + from.source * (args.chunk.places.num_experts + 1);
    const long long first =
        (long long)args.chunk.begin[from.source] * args.chunk.num_experts_per_token;
    const long long row = row_of_result(first, prefixes, choice_of(args.chunk, from, pair));
    args.output_rows[position] =
        static_cast<char *>(args.results[from.source]) + row * args.width_bytes;
  }
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

// Rows of results as they are: 16 bytes of one are 16 of the output.
template <typename Number>
struct FullRow {
  using Scalar = Number;
  static constexpr int kElements = 16 / sizeof(Scalar);  // of 16 bytes
  static constexpr bool kHasScale = false;

  __device__ static void add(float *sums, float weight, uint4 vector) {
    add_weighted(sums, weight, vector, static_cast<const Scalar *>(nullptr));
  }

  __device__ static void store(uint4 *row, int vector, const float *sums) {
    row[vector] = rounded<Scalar>(sums);
  }
};

__device__ inline float code_of(const uint4 &vector, int j) {
  const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
  return (float)(signed char)(words[j / 4] >> 8 * (j % 4));
}

// Codes with a scale a row: 16 bytes of them are 32 of the output.
template <typename Number>
struct Int8Row {
  using Scalar = Number;
  static constexpr int kElements = 16, kVectors = 2;
  static constexpr bool kHasScale = true;

  __device__ static void add(float *sums, float scale, uint4 vector) {
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      sums[j] = __fadd_rn(sums[j], __fmul_rn(scale, code_of(vector, j)));
    }
  }

  __device__ static void store(uint4 *row, int vector, const float *sums) {
    row[2 * vector] = rounded<Scalar>(sums);
    row[2 * vector + 1] = rounded<Scalar>(sums + 8);
  }

  __device__ static void copy(uint4 *row, int vector, uint4 codes, float scale) {
    float values[kElements];
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      values[j] = __fmul_rn(scale, code_of(codes, j));
    }
    store(row, vector, values);
  }
};

// Rows of any kind, copied.
struct AnyRow {
  static constexpr int kVectors = 1;
  static constexpr bool kHasScale = false;

  __device__ static void copy(uint4 *row, int vector, uint4 bytes, float) { row[vector] = bytes; }
};

__device__ inline float scale_of_row(const void *rows, long long scale_offset, long long row) {
  return __ldcg(
      reinterpret_cast<const float *>(static_cast<const char *>(rows) + scale_offset) + row);
}

// What a lane adds to its token: a row of some rank, and what that is multiplied by.
struct Term {
  const char *row;  // null: nothing
  float factor;
};

// The index-th term of a token of the chunk, for lanes that have one; a token's are beside each
// other. For whole warps.
template <typename Row>
__device__ inline Term term_of(const light_exchange_combine_args &args, bool mine, int token,
                               int index) {
  const int num_pairs = args.num_experts_per_token;
  const long long number = args.first_token + token, pair = number * num_pairs + index;
  const int choice = mine ? args.choices[pair] : -1;
  if (!args.summed) {
    if (choice < 0) {
      return {nullptr, 0.0f};
    }
    const int rank = args.together ? args.rank : place_of(args.places, args.rank, choice).rank;
    const long long first = (long long)args.first_token * num_pairs;
    const long long row = row_of_result(first, args.prefixes, choice);
    return {static_cast<const char *>(args.results[rank]) + row * args.width_bytes,
            args.weights[pair]};
  }
  const Place place = place_of(args.places, args.rank, choice);
  const int first_lane = threadIdx.x % 32 - index;
  unsigned long long ranks = 0;  // that have a sum of the token
  for (int k = 0; k < num_pairs; ++k) {
    const int rank = __shfl_sync(kAllLanes, place.rank, (first_lane + k) % 32);
    ranks |= rank < 0 ? 0 : 1ull << rank;
  }
  for (int i = 0; i < index; ++i) {
    ranks &= ranks - 1;
  }
  if (!mine || ranks == 0) {
    return {nullptr, 0.0f};
  }
  const void *sums = args.results[__ffsll(ranks) - 1];
  return {static_cast<const char *>(sums) + number * args.width_bytes,
          Row::kHasScale ? scale_of_row(sums, args.scale_offset, number) : 1.0f};
}

}  // namespace light

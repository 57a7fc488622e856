// Rows between ranks by plain loads, a warp a token: hidden states in, results summed where they were
// computed, results or those sums back, and how many there are.
#pragma once

#include "exchange_places.cuh"
#include "light_ops.h"
#include "row_codes.cuh"
#include "rows.cuh"

namespace light {

constexpr int kVectorsInFlight = 8;  // 16-byte loads of a lane that cross a link together
constexpr int kVectorsSummed = 4;    // 16-byte loads of a lane from the card's own memory

// A warp takes a token of some rank, and copies its row to each of its pairs that this rank has.
template <typename Row>
__device__ void pull(const light_exchange_pull_args &args) {
  const light_chunk &chunk = args.chunk;
  const int lane = threadIdx.x % 32, num_vectors = args.width_bytes / 16;
  const int num_warps = gridDim.x * (blockDim.x / 32);
  const int total = count_tokens(chunk);
  const Turns turns(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, num_warps, total);
  for (int turn = 0; turn < turns.count; ++turn) {
    const SourceToken from = source_of(chunk, turns[turn], total);
    const Place place = place_of_lane(chunk, from);
    const unsigned here = __ballot_sync(kAllLanes, place.rank == chunk.rank);
    if (here == 0) {
      continue;
    }
    if (place.rank == chunk.rank) {
      describe_pair(args, from, lane, place.position);
    }
    const void *hidden = args.hidden[from.source];
    const float scale =
        Row::kHasScale ? scale_of_row(hidden, args.scale_offset, from.token) : 1.0f;
    const uint4 *vectors_of_row =
        static_cast<const uint4 *>(hidden) + (long long)from.token * num_vectors;
    for (int first = lane; first - lane < num_vectors; first += 32 * kVectorsInFlight) {
      uint4 vectors[kVectorsInFlight];
#pragma unroll
      for (int i = 0; i < kVectorsInFlight; ++i) {
        if (first + 32 * i < num_vectors) {
          vectors[i] = __ldcg(vectors_of_row + first + 32 * i);
        }
      }
      for (unsigned left = here; left != 0; left &= left - 1) {
        const int position = __shfl_sync(kAllLanes, place.position, __ffs(left) - 1);
        uint4 *to =
            static_cast<uint4 *>(args.rows) + (long long)position * num_vectors * Row::kVectors;
#pragma unroll
        for (int i = 0; i < kVectorsInFlight; ++i) {
          if (first + 32 * i < num_vectors) {
            Row::copy(to, first + 32 * i, vectors[i], scale);
          }
        }
      }
    }
  }
}

// light_combine's sum of what ranks gave: a warp takes a token of this rank, or one of `num_parts`
// of its row. A lane has `kPlaces` places of a row at once.
template <typename Row, int kPlaces>
__device__ void combine_parts(const light_exchange_combine_args &args, int num_parts) {
  constexpr int kOutputVectors = Row::kElements * sizeof(typename Row::Scalar) / 16;
  constexpr int kPairs = kVectorsInFlight / kPlaces;
  const int lane = threadIdx.x % 32, num_pairs = args.num_experts_per_token;
  const int num_vectors = args.width_bytes / 16;
  const int num_warps = gridDim.x * (blockDim.x / 32);
  const int num_units = args.num_tokens * num_parts;
  for (int unit = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; unit < num_units;
       unit += num_warps) {
    const int token = unit / num_parts, first_vector = unit % num_parts * 32 + lane;
    const Term term = term_of<Row>(args, lane < num_pairs, token, lane);
    uint4 *output =
        static_cast<uint4 *>(args.output) + (long long)token * num_vectors * kOutputVectors;
    const int step = 32 * num_parts;
    for (int first = first_vector; first - lane < num_vectors; first += step * kPlaces) {
      float sums[kPlaces][Row::kElements] = {};
      for (int k = 0; k < num_pairs; k += kPairs) {
        uint4 vectors[kPairs][kPlaces];
        bool exists[kPairs];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const uint4 *from = reinterpret_cast<const uint4 *>(__shfl_sync(
              kAllLanes, reinterpret_cast<unsigned long long>(term.row), (k + i) % 32));
          exists[i] = k + i < num_pairs && from != nullptr;
#pragma unroll
          for (int j = 0; j < kPlaces; ++j) {
            if (exists[i] && first + step * j < num_vectors) {
              vectors[i][j] = __ldcg(from + first + step * j);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const float factor = __shfl_sync(kAllLanes, term.factor, (k + i) % 32);
#pragma unroll
          for (int j = 0; j < kPlaces; ++j) {
            if (exists[i] && first + step * j < num_vectors) {
              Row::add(sums[j], factor, vectors[i][j]);
            }
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kPlaces; ++j) {
        if (first + step * j < num_vectors) {
          Row::store(output, first + step * j, sums[j]);
        }
      }
    }
  }
}

// Rows are cut where there are more warps than tokens. Where a part is a place of each lane, the
// pairs' loads are on their way together, else those of several places: few pairs fill no link. Sums
// of codes leave no registers for that.
template <typename Row>
__device__ void combine(const light_exchange_combine_args &args) {
  const int num_vectors = args.width_bytes / 16;
  const int num_warps = gridDim.x * (blockDim.x / 32);
  const int num_parts = max(1, min((num_vectors + 31) / 32, num_warps / args.num_tokens));
  if (Row::kElements > 8 || 32 * num_parts >= num_vectors) {
    combine_parts<Row, 1>(args, num_parts);
  } else {
    combine_parts<Row, 4>(args, num_parts);
  }
}

// A warp takes a pair.
__device__ inline void give(const light_exchange_give_args &args) {
  const int lane = threadIdx.x % 32, num_vectors = args.width_bytes / 16;
  const int num_warps = gridDim.x * (blockDim.x / 32);
  const int num_pairs = min(*args.num_pairs, args.most_pairs);
  for (int pair = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; pair < num_pairs;
       pair += num_warps) {
    const uint4 *from = static_cast<const uint4 *>(args.pairs) + (long long)pair * num_vectors;
    uint4 *to = static_cast<uint4 *>(args.output_rows[pair]);
    for (int vector = lane; vector < num_vectors; vector += 32) {
      to[vector] = from[vector];
    }
  }
}

// Adds up the vectors `first`, `first` + 32, ... of the pairs at the positions of lanes `here`.
template <typename Scalar>
__device__ inline void sum_vectors(const light_exchange_sum_args &args, int position, unsigned here,
                                   int first,
                                   float (&sums)[kVectorsSummed][FullRow<Scalar>::kElements]) {
  const int num_vectors = args.width_bytes / 16;
#pragma unroll
  for (int i = 0; i < kVectorsSummed; ++i) {
#pragma unroll
    for (int j = 0; j < FullRow<Scalar>::kElements; ++j) {
      sums[i][j] = 0.0f;
    }
  }
  for (unsigned left = here; left != 0; left &= left - 1) {
    const uint4 *pair = static_cast<const uint4 *>(args.pairs) +
                        (long long)__shfl_sync(kAllLanes, position, __ffs(left) - 1) * num_vectors;
    uint4 vectors[kVectorsSummed];
#pragma unroll
    for (int i = 0; i < kVectorsSummed; ++i) {
      if (first + 32 * i < num_vectors) {
        vectors[i] = pair[first + 32 * i];
      }
    }
#pragma unroll
    for (int i = 0; i < kVectorsSummed; ++i) {
      if (first + 32 * i < num_vectors) {
        FullRow<Scalar>::add(sums[i], 1.0f, vectors[i]);
      }
    }
  }
}

// The magnitude of the largest of a warp's elements, NaN where one is not finite; from the bits of
// each lane's largest, which are ordered like magnitudes.
__device__ inline float largest_of_warp(unsigned largest) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const unsigned other = __shfl_xor_sync(kAllLanes, largest, offset);
    largest = largest > other ? largest : other;
  }
  const float value = __uint_as_float(largest);
  return value - value == 0.0f ? value : __uint_as_float(0x7fffffffu);
}

// A warp takes a token of some rank, and adds up its results that this rank has.
template <typename Scalar>
__device__ void sum_pairs(const light_exchange_sum_args &args) {
  const light_chunk &chunk = args.chunk;
  const int lane = threadIdx.x % 32, num_vectors = args.width_bytes / 16;
  const int num_warps = gridDim.x * (blockDim.x / 32);
  const int total = count_tokens(chunk);
  for (int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; row < total;
       row += num_warps) {
    const SourceToken from = source_of(chunk, row, total);
    const Place place = place_of_lane(chunk, from);
    const unsigned here = __ballot_sync(kAllLanes, place.rank == chunk.rank);
    if (here == 0) {
      continue;
    }
    uint4 *to = static_cast<uint4 *>(args.sums[from.source]) + (long long)from.token * num_vectors;
    for (int first = lane; first - lane < num_vectors; first += 32 * kVectorsSummed) {
      float sums[kVectorsSummed][FullRow<Scalar>::kElements];
      sum_vectors<Scalar>(args, place.position, here, first, sums);
#pragma unroll
      for (int i = 0; i < kVectorsSummed; ++i) {
        if (first + 32 * i < num_vectors) {
          FullRow<Scalar>::store(to, first + 32 * i, sums[i]);
        }
      }
    }
  }
}

// The same, as codes: the sums are made twice, for their scale and for the codes.
template <typename Scalar>
__device__ void sum_pairs_as_int8(const light_exchange_sum_args &args) {
  const light_chunk &chunk = args.chunk;
  const int lane = threadIdx.x % 32, num_vectors = args.width_bytes / 16;
  const int num_warps = gridDim.x * (blockDim.x / 32);
  const int total = count_tokens(chunk);
  for (int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; row < total;
       row += num_warps) {
    const SourceToken from = source_of(chunk, row, total);
    const Place place = place_of_lane(chunk, from);
    const unsigned here = __ballot_sync(kAllLanes, place.rank == chunk.rank);
    if (here == 0) {
      continue;
    }
    float sums[kVectorsSummed][8];
    unsigned largest = 0;
    for (int first = lane; first - lane < num_vectors; first += 32 * kVectorsSummed) {
      sum_vectors<Scalar>(args, place.position, here, first, sums);
#pragma unroll
      for (int i = 0; i < kVectorsSummed; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const unsigned magnitude = __float_as_uint(sums[i][j]) & 0x7fffffffu;
          largest = largest > magnitude ? largest : magnitude;
        }
      }
    }
    const float magnitude = largest_of_warp(largest);
    const float inverse = inverse_of<Int8>(magnitude);
    char *codes = static_cast<char *>(args.sums[from.source]);
    if (lane == 0) {
      reinterpret_cast<float *>(codes + args.scale_offset)[from.token] =
          scale_of<Int8>(magnitude);
    }
    uint2 *to = reinterpret_cast<uint2 *>(codes) + (long long)from.token * num_vectors;
    for (int first = lane; first - lane < num_vectors; first += 32 * kVectorsSummed) {
      sum_vectors<Scalar>(args, place.position, here, first, sums);
#pragma unroll
      for (int i = 0; i < kVectorsSummed; ++i) {
        if (first + 32 * i < num_vectors) {
          unsigned short pairs[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            pairs[j] = Int8::two(__fmul_rn(sums[i][2 * j], inverse),
                                 __fmul_rn(sums[i][2 * j + 1], inverse));
          }
          to[first + 32 * i] = {pairs[0] | (unsigned)pairs[1] << 16,
                                pairs[2] | (unsigned)pairs[3] << 16};
        }
      }
    }
  }
}

// A warp takes a token of some rank.
__device__ inline void count_sent(const light_exchange_count_args &args) {
  const light_chunk &chunk = args.chunk;
  const int lane = threadIdx.x % 32;
  const int num_warps = gridDim.x * (blockDim.x / 32);
  const int total = count_tokens(chunk);
  for (int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; row < total;
       row += num_warps) {
    const SourceToken from = source_of(chunk, row, total);
    const Place place = place_of_lane(chunk, from);
    const unsigned here = __ballot_sync(kAllLanes, place.rank == chunk.rank);
    if (lane == 0 && here != 0) {
      atomicAdd(args.results_sent + from.source, args.summed ? 1ull : __popc(here));
    }
    bool first = place.rank >= 0 && from.source == chunk.rank;  // of the token's pairs there
    for (int k = 0; k < chunk.num_experts_per_token; ++k) {
      const int other = __shfl_sync(kAllLanes, place.rank, k);
      first &= k >= lane || other != place.rank;
    }
    if (first) {
      atomicAdd(args.rows_sent + place.rank, 1ull);
    }
  }
}

}  // namespace light

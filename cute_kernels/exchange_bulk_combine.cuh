// The sum of each token's results through shared memory by bulk copies (sm_90): few multiprocessors
// keep the card's memory busy. Every warp has a ring of its own.
#pragma once

#include "exchange_bulk.cuh"

#if __CUDA_ARCH__ >= 900

namespace light {

// A warp's part of shared memory: stages, each a piece of all rows of a token, then their barriers.
// The lane of a pair copies its row's piece in, and all lanes add the pieces up.
struct CombineRing {
  static constexpr int kStages = ring::kCombineStages;
  const char *stages;
  unsigned barriers;
  unsigned loads = 0, sums = 0;  // so far: stage n % kStages, in its n / kStages-th use

  __device__ CombineRing(const char *shared, int warp)
      : stages(shared + warp * ring::kCombineWarpBytes),
        barriers(shared_address(stages) + kStages * ring::kCombineStageBytes) {
    if (threadIdx.x % 32 == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        init_barrier(barriers + 8 * stage, 1);
      }
      publish_barriers();
    }
    __syncwarp();
  }

  // For a whole warp: `bytes` at `offset` of the row of each of the lanes `here`, which is the
  // `pair`-th of its token.
  __device__ void load(const char *row, unsigned here, int pair, int offset, int bytes) {
    const unsigned stage = loads++ % kStages, barrier = barriers + 8 * stage;
    const int lane = threadIdx.x % 32;
    __syncwarp();  // all lanes have read what the stage held
    if (lane == 0) {
      arrive_expecting(barrier, __popc(here) * bytes);
    }
    __syncwarp();
    if (here >> lane & 1) {
      load_bulk(shared_address(stages) + stage * ring::kCombineStageBytes + pair * bytes,
                row + offset, bytes, barrier);
    }
  }

  // The oldest stage, once all of it is there.
  __device__ const uint4 *next() {
    const unsigned use = sums++, stage = use % kStages;
    wait_barrier(barriers + 8 * stage, use / kStages % 2);
    return reinterpret_cast<const uint4 *>(stages + stage * ring::kCombineStageBytes);
  }
};

// As combine() of rows of results as they are: `at_once` tokens a turn, whose rows are looked up
// together.
template <typename Row>
__device__ void combine_bulk(const light_exchange_combine_args &args, const char *shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int num_warps = gridDim.x * (blockDim.x / 32), num_pairs = args.num_experts_per_token;
  const int piece_bytes = ring::combine_piece_bytes(num_pairs, args.width_bytes);
  const int num_pieces = (args.width_bytes + piece_bytes - 1) / piece_bytes;
  const int at_once = ring::combine_tokens(args.num_tokens, num_pairs, num_warps);
  const int my_token = lane / num_pairs, my_pair = lane % num_pairs;
  CombineRing ring(shared, warp);

  const auto look_up = [&](int first) {
    const bool mine = my_token < at_once && first + my_token < args.num_tokens;
    return term_of<Row>(args, mine, mine ? first + my_token : 0, my_pair);
  };
  int first = at_once * (blockIdx.x + gridDim.x * warp);
  Term ahead = look_up(first);
  for (; first < args.num_tokens; first += at_once * num_warps) {
    const Term term = ahead;
    const unsigned there = __ballot_sync(kAllLanes, term.row != nullptr);
    const int num_units = num_pieces * min(at_once, args.num_tokens - first);
    const auto load = [&](int unit) {
      const int token = unit / num_pieces, offset = unit % num_pieces * piece_bytes;
      const unsigned pairs = ((1u << num_pairs) - 1) << token * num_pairs;
      ring.load(term.row, there & pairs, my_pair, offset, min(piece_bytes, args.width_bytes - offset));
    };
    for (int unit = 0; unit < min(num_units, CombineRing::kStages); ++unit) {
      load(unit);
    }
    ahead = look_up(first + at_once * num_warps);
    for (int unit = 0; unit < num_units; ++unit) {
      const int token = unit / num_pieces, offset = unit % num_pieces * piece_bytes;
      const int num_vectors = min(piece_bytes, args.width_bytes - offset) / 16;
      uint4 *output = reinterpret_cast<uint4 *>(static_cast<char *>(args.output) +
                                                (long long)(first + token) * args.width_bytes + offset);
      const uint4 *pieces = ring.next();
      for (int vector = lane; vector - lane < num_vectors; vector += 32) {
        float sums[Row::kElements] = {};
#pragma unroll 4
        for (int pair = 0; pair < num_pairs; ++pair) {
          const int source = token * num_pairs + pair;
          const float factor = __shfl_sync(kAllLanes, term.factor, source);
          if ((there >> source & 1) && vector < num_vectors) {
            Row::add(sums, factor, pieces[pair * num_vectors + vector]);
          }
        }
        if (vector < num_vectors) {
          Row::store(output, vector, sums);
        }
      }
      if (unit + CombineRing::kStages < num_units) {
        load(unit + CombineRing::kStages);
      }
    }
  }
}

}  // namespace light

#endif

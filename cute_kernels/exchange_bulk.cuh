// Rows of other ranks through shared memory by bulk copies (sm_90): few multiprocessors keep a link
// busy, because what is on its way takes no registers. Every warp has a ring of its own.
#pragma once

#include "exchange_places.cuh"
#include "exchange_sizes.h"
#include "shared_barriers.cuh"

#if __CUDA_ARCH__ >= 900

namespace light {

__device__ inline void load_bulk(unsigned to, const void *from, int bytes, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ inline void store_bulk(void *to, unsigned from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}

__device__ inline void end_store_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most `groups` of this thread's groups of stores still read shared memory.
template <int groups>
__device__ inline void await_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(groups) : "memory");
}

__device__ inline void await_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// A warp's part of shared memory: stages, then their barriers, then positions of tokens. Lane 0
// copies a row's pieces in, and out to each of its positions. Where a token has few pairs there is
// room for the positions of twice 32 tokens: the next ones are looked up while rows are on their way.
struct PullRing {
  static constexpr int kStages = ring::kPullStages, kLoadsInFlight = 4;
  struct Job {
    int first, offset;  // the first of its positions, where the piece begins in the row
  };
  unsigned stages;
  unsigned barriers;
  int *positions;
  Job jobs[kStages];
  unsigned turn = 0;    // loads so far: stage turn % n, in its turn / n-th use
  unsigned stored = 0;

  __device__ PullRing(char *shared, int warp) {
    char *mine = shared + warp * ring::kWarpBytes;
    stages = shared_address(mine);
    barriers = stages + kStages * ring::kPullStageBytes;
    positions =
        reinterpret_cast<int *>(mine + kStages * ring::kPullStageBytes + 8 * kStages);
    if (threadIdx.x % 32 == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        init_barrier(barriers + 8 * stage, 1);
      }
      publish_barriers();
    }
    __syncwarp();
  }

  static __device__ int piece_bytes(const light_exchange_pull_args &args, int offset) {
    return min(ring::kPullStageBytes, args.width_bytes - offset);
  }

  __device__ void store_oldest(const light_exchange_pull_args &args) {
    const unsigned stage = stored % kStages;
    wait_barrier(barriers + 8 * stage, stored / kStages % 2);
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      if (i == stage) {
        const Job job = jobs[i];
        for (int pair = 0; pair < args.chunk.num_experts_per_token; ++pair) {
          const int position = positions[job.first + pair];
          if (position >= 0) {
            store_bulk(static_cast<char *>(args.rows) +
                           (long long)position * args.width_bytes + job.offset,
                       stages + stage * ring::kPullStageBytes, piece_bytes(args, job.offset));
          }
        }
      }
    }
    end_store_group();
    ++stored;
  }

  __device__ void load(const light_exchange_pull_args &args, const char *row, int first,
                       int offset) {
    if (turn - stored == kLoadsInFlight) {
      store_oldest(args);
    }
    // This stage's last stores are older than those of the stages between.
    await_stores_read<kStages - kLoadsInFlight>();
    const unsigned stage = turn % kStages;
    const int bytes = piece_bytes(args, offset);
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      if (i == stage) {
        jobs[i] = {first, offset};
      }
    }
    arrive_expecting(barriers + 8 * stage, bytes);
    load_bulk(stages + stage * ring::kPullStageBytes, row + offset, bytes, barriers + 8 * stage);
    ++turn;
  }

  // What was loaded up to this turn.
  __device__ void store_until(const light_exchange_pull_args &args, unsigned end) {
    while (static_cast<int>(end - stored) > 0) {
      store_oldest(args);
    }
  }
};

// How many tokens a warp looks up at once: as many each time.
__device__ inline int tokens_at_once(int total, int num_warps) {
  const int each = (total + num_warps - 1) / num_warps, times = (each + 31) / 32;
  return times > 0 ? (each + times - 1) / times : 1;
}

__device__ void pull_bulk(const light_exchange_pull_args &args, char *shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int num_warps = gridDim.x * (blockDim.x / 32);
  PullRing ring(shared, warp);
  const light_chunk &chunk = args.chunk;
  const int total = count_tokens(chunk), num_pairs = chunk.num_experts_per_token;
  const int at_once = tokens_at_once(total, num_warps);
  const bool alternates = 2 * num_pairs <= ring::kMostPairs;
  int buffer = 0;
  unsigned end = 0, end_before = 0;  // turns at the ends of the last looks, the last one's first
  const Turns turns(at_once * (blockIdx.x + gridDim.x * warp), at_once * num_warps, total);
  for (int turn = 0; turn < turns.count; ++turn) {
    const int first = turns[turn];
    const int first_position = buffer * 32 * num_pairs;
    if (lane == 0) ring.store_until(args, alternates ? end_before : end);
    __syncwarp();
    // A lane looks a token up.
    const int last = min(total, first + at_once);
    const SourceToken from = source_of(chunk, first + lane, last);
    int choices[ring::kMostPairs];
#pragma unroll
    for (int pair = 0; pair < ring::kMostPairs; ++pair) {
      choices[pair] = pair < chunk.num_experts_per_token ? choice_of(chunk, from, pair) : -1;
    }
    bool wanted = false;
#pragma unroll
    for (int pair = 0; pair < ring::kMostPairs; ++pair) {
      if (pair < chunk.num_experts_per_token) {
        const Place place = place_of(chunk.places, from.source, choices[pair]);
        const bool here = place.rank == chunk.rank;
        ring.positions[first_position + lane * num_pairs + pair] = here ? place.position : -1;
        if (here) {
          describe_pair(args, from, pair, place.position);
        }
        wanted |= here;
      }
    }
    __syncwarp();
    for (unsigned left = __ballot_sync(kAllLanes, wanted); left != 0; left &= left - 1) {
      const int token = __ffs(left) - 1;
      const int source = __shfl_sync(kAllLanes, from.source, token);
      const int index = __shfl_sync(kAllLanes, from.token, token);
      if (lane == 0) {
        const char *row = static_cast<const char *>(args.hidden[source]) +
                          (long long)index * args.width_bytes;
        for (int offset = 0; offset < args.width_bytes; offset += ring::kPullStageBytes) {
          ring.load(args, row, first_position + token * num_pairs, offset);
        }
      }
    }
    end_before = end;
    end = ring.turn;
    if (alternates) buffer = 1 - buffer;
  }
  if (lane == 0) {
    ring.store_until(args, ring.turn);
    await_stores();
  }
}

}  // namespace light

#endif

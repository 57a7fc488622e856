// What the phases of a route share: its tables in shared memory, and a warp's elementary steps.
#pragma once

#include "light_ops.h"
#include "route_sizes.h"

namespace light::route {

enum Route { kHome = 0, kEven = 1, kWaterfill = 2, kFewest = 3 };

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kTokenBits = 26;  // of all pairs of all ranks
constexpr int kExpertBits = 9;
constexpr int kNoExpert = kMaxExperts;
// More than three loads, and still three of these are an int.
constexpr int kOutOfReach = 1 << (kTokenBits + 3);

using RankSet = unsigned long long;  // a bit for each rank

// An expert that has a choice.
struct __align__(16) Listed {
  RankSet ranks;
  int tokens, expert;
};

// What a turn needs of a pool: its tokens and, where its ranks are two or three, the next and the
// other one of the first, second and third rank, a byte each, beginning again behind the last.
struct __align__(16) Pool {
  int tokens;
  unsigned next, other;
  int of_three;  // tokens, and what makes whole numbers of thirds; of two ranks: out of reach
};

// The pool whose turn a batch is on a rank, and which of the pool's ranks that is, where they are
// few.
using Seat = unsigned short;
constexpr int kPlaceBits = 2;

// A pool is all experts of the same ranks, and has the number of the first of them. Where an
// expert's tokens stay together, each is a pool.
struct Tables {
  RankSet *ranks_of;       // [E + 1] that hold a copy
  Listed *listed;          // [E] experts with a choice, in any order
  Pool *pools;             // [E + 1]
  unsigned long long *keys;  // [E] of what is listed: the larger, the earlier its pool; 0: none
  int *tile_offsets;       // [E + 1] in the place of the keys, once those were used
  int *rank_load;          // [W] before the first turn: tokens, or experts where those count
  int *num_listed;
  int *totals;             // [E + 1] tokens of all ranks
  int *starts;             // [E + 1, stride] tokens of each pool, then of each expert, on each
                           // rank; at last those of the experts before it
  unsigned short *order;   // [E] pools in the order of their turns
  unsigned short *next;    // [E] the next expert of the pool
  Seat *seats;             // [batches, W]; nobody's pool is E
  unsigned char *most_copies;  // [batches] ranks of the pool that has most
  int stride;

  __device__ Tables(const light_route_split_args &args, char *memory)
      : Tables(Layout(args.num_experts, args.num_ranks), memory, args.num_ranks) {}

  __device__ int &share(int expert, int rank) const { return starts[expert * stride + rank]; }

 private:
  __device__ Tables(const Layout &layout, char *memory, int num_ranks)
      : ranks_of(reinterpret_cast<RankSet *>(memory + layout.ranks_of)),
        listed(reinterpret_cast<Listed *>(memory + layout.listed)),
        pools(reinterpret_cast<Pool *>(memory + layout.pools)),
        keys(reinterpret_cast<unsigned long long *>(memory + layout.keys)),
        tile_offsets(reinterpret_cast<int *>(memory + layout.keys)),
        rank_load(reinterpret_cast<int *>(memory + layout.rank_load)),
        num_listed(reinterpret_cast<int *>(memory + layout.num_listed)),
        totals(reinterpret_cast<int *>(memory + layout.totals)),
        starts(reinterpret_cast<int *>(memory + layout.starts)),
        order(reinterpret_cast<unsigned short *>(memory + layout.order)),
        next(reinterpret_cast<unsigned short *>(memory + layout.next)),
        seats(reinterpret_cast<Seat *>(memory + layout.seats)),
        most_copies(reinterpret_cast<unsigned char *>(memory + layout.most_copies)),
        stride(row_stride(num_ranks)) {}
};

__device__ inline int count_of(const light_route_split_args &args, int source, int expert) {
  const int *offsets = args.source_offsets + source * args.source_stride + expert;
  return offsets[1] - offsets[0];
}

__device__ inline int copy_rank(const light_route_split_args &args, int expert, int copy) {
  return args.copy_ranks[expert * args.num_copies + copy];
}

__device__ inline int clamp(int value, int low, int high) { return min(max(value, low), high); }

// As what it is: the same in all lanes.
__device__ inline int warp_index() { return __shfl_sync(kAllLanes, threadIdx.x / 32, 0); }

// -1 of none.
__device__ inline int lowest(unsigned ranks) { return __ffs(ranks) - 1; }
__device__ inline int lowest(RankSet ranks) { return __ffsll(ranks) - 1; }

__device__ inline int largest_of_lanes(int value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kAllLanes, value);
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
#endif
}

__device__ inline int sum_of_lanes(int value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kAllLanes, value);
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
#endif
}

__device__ inline int inclusive_scan(int value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(kAllLanes, value, offset);
    value += lane >= offset ? before : 0;
  }
  return value;
}

}  // namespace light::route

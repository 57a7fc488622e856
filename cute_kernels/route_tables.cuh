// What the phases of a route share: its tables in shared memory, and a warp's elementary steps.
#pragma once

#include "light_ops.h"
#include "route_sizes.h"

namespace light::route {

enum Route { kHome = 0, kEven = 1, kWaterfill = 2, kFewest = 3 };

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarps = kThreads / 32;
constexpr int kAtOnce = 4;  // loads that are on their way together
constexpr int kTokenBits = 26;  // of all pairs of all ranks
constexpr int kExpertBits = 9;
constexpr int kNoExpert = kMaxExperts;

using RankSet = unsigned long long;  // a bit for each rank

// An expert that has a choice.
struct __align__(16) Listed {
  RankSet ranks;
  int tokens, expert;
};

// What a rank needs to know of the pool that has its turn there in a batch (route_pour.cuh); all
// zeros where none has.
struct __align__(16) Seat {
  int tokens, of_two, of_three;
  unsigned others;
};
static_assert(sizeof(Seat) + sizeof(int) == kBytesOfSeat, "the other four are what it gave");

// A pool is all experts of the same ranks, and has the number of the first of them. Where an
// expert's tokens stay together, each is a pool.
struct Tables {
  Listed *listed;            // [E] experts with a choice, in any order
  Seat *seats;               // [batches, W] in the place of what was listed
  int *given;                // [batches, W] tokens that the pool has there
  RankSet *ranks_of;         // [E] that hold a copy
  unsigned long long *keys;  // [E] of what is listed: the larger, the earlier its pool; 0: none
  int *tile_offsets;         // [E + 1] in the place of the keys, once those were used
  int *rank_load;            // [W] before the first turn: tokens, or experts where those count
  int *num_listed;
  int *totals;            // [E] tokens of all ranks
  int *pooled;            // [E] those of a pool
  int *starts;            // [E + 1, stride] tokens of each pool, then of each expert, on each rank;
                          // at last those of the experts before it
  unsigned short *order;  // [E] pools in the order of their turns
  unsigned short *next;   // [E] the next expert of the pool
  int stride;

  __device__ Tables(const light_route_split_args &args, char *memory)
      : Tables(Layout(args.num_experts, args.num_ranks), memory, args.num_ranks) {}

  __device__ int &share(int expert, int rank) const { return starts[expert * stride + rank]; }

 private:
  __device__ Tables(const Layout &layout, char *memory, int num_ranks)
      : listed(reinterpret_cast<Listed *>(memory + layout.listed)),
        seats(reinterpret_cast<Seat *>(memory + layout.seats)),
        given(reinterpret_cast<int *>(memory + layout.given)),
        ranks_of(reinterpret_cast<RankSet *>(memory + layout.ranks_of)),
        keys(reinterpret_cast<unsigned long long *>(memory + layout.keys)),
        tile_offsets(reinterpret_cast<int *>(memory + layout.keys)),
        rank_load(reinterpret_cast<int *>(memory + layout.rank_load)),
        num_listed(reinterpret_cast<int *>(memory + layout.num_listed)),
        totals(reinterpret_cast<int *>(memory + layout.totals)),
        pooled(reinterpret_cast<int *>(memory + layout.pooled)),
        starts(reinterpret_cast<int *>(memory + layout.starts)),
        order(reinterpret_cast<unsigned short *>(memory + layout.order)),
        next(reinterpret_cast<unsigned short *>(memory + layout.next)),
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

__device__ inline int warp_index() { return __shfl_sync(kAllLanes, threadIdx.x / 32, 0); }

// A lane stands for one rank or two.
__device__ inline int rank_of(int slot) { return threadIdx.x % 32 + 32 * slot; }
__device__ inline bool is_in(RankSet ranks, int rank) { return ranks >> rank & 1; }

// -1 of none.
__device__ inline int lowest(RankSet ranks) { return __ffsll(ranks) - 1; }
__device__ inline RankSet without_lowest(RankSet ranks) { return ranks & (ranks - 1); }

// The value of a rank, of whose number only the lowest bits are looked at. Lanes may ask for any;
// what they get of none means nothing.
template <int kRanksPerLane>
__device__ int value_of(const int (&values)[kRanksPerLane], unsigned rank) {
  int value = __shfl_sync(kAllLanes, values[0], rank);
  if constexpr (kRanksPerLane == 2) {
    const int upper = __shfl_sync(kAllLanes, values[1], rank);
    value = rank & 32 ? upper : value;
  }
  return value;
}

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

// Of each rank's, those before it; `total` becomes all of them.
template <int kRanksPerLane>
__device__ void sum_before(const int (&values)[kRanksPerLane], int (&before)[kRanksPerLane],
                           int &total) {
  total = 0;
#pragma unroll
  for (int slot = 0; slot < kRanksPerLane; ++slot) {
    const int end = total + inclusive_scan(values[slot]);
    before[slot] = end - values[slot];
    total = __shfl_sync(kAllLanes, end, 31);
  }
}

// Neighbouring lanes that work together: as many as there are ranks, or half as many.
struct Group {
  int num_lanes, num_groups, index, lane;

  __device__ explicit Group(int num_ranks)
      : num_lanes(num_ranks <= 16 ? 16 : 32),
        num_groups(num_ranks <= 16 ? 2 * kWarps : kWarps),
        index(num_ranks <= 16 ? threadIdx.x / 16 : threadIdx.x / 32),
        lane(num_ranks <= 16 ? threadIdx.x % 16 : threadIdx.x % 32) {}

  template <int kRanksPerLane>
  __device__ int value_of(const int (&values)[kRanksPerLane], int rank) const {
    int value = __shfl_sync(kAllLanes, values[0], rank, num_lanes);
    if constexpr (kRanksPerLane == 2) {
      const int upper = __shfl_sync(kAllLanes, values[1], rank);
      value = rank & 32 ? upper : value;
    }
    return value;
  }

  template <int kRanksPerLane>
  __device__ void sum_before(const int (&values)[kRanksPerLane],
                             int (&before)[kRanksPerLane]) const {
    int total = 0;
#pragma unroll
    for (int slot = 0; slot < kRanksPerLane; ++slot) {
      int end = values[slot];
      for (int offset = 1; offset < num_lanes; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, end, offset, num_lanes);
        end += lane >= offset ? other : 0;
      }
      before[slot] = total + end - values[slot];
      total += __shfl_sync(kAllLanes, end, num_lanes - 1, num_lanes);
    }
  }
};

// The ranks of which it is true.
template <int kRanksPerLane>
__device__ RankSet ranks_where(const bool (&is_true)[kRanksPerLane]) {
  RankSet ranks = 0;
#pragma unroll
  for (int slot = 0; slot < kRanksPerLane; ++slot) {
    ranks |= static_cast<RankSet>(__ballot_sync(kAllLanes, is_true[slot])) << 32 * slot;
  }
  return ranks;
}

}  // namespace light::route
